"""What PEFT's SMT tuner is asked for, and which blocks that means: `SmtConfig` and its selection in plain JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..core.budget import Budget
from ..core.errors import ThriftyError, unknown
from ..core.plan import Plan
from ..core.region import Blocks
from ..select.blocks import BlockSize, block_numbers, block_shape
from ..select.pick import pick
from ..select.targets import Target

__all__ = ["SMT", "SmtConfig"]

_WEIGHT = ".weight"
_RUN = "[0-9]{1,12}(-[0-9]{1,12})?"
_RUNS = f"{_RUN}(,{_RUN})*"


class _PeftType(str):
    """PEFT's types are members of an enum that cannot grow: a string that can be asked what they are asked."""

    @property
    def value(self) -> str:
        return str.__str__(self)

    name = value

    def __str__(self) -> str:
        return f"PeftType.{self.value}"


SMT = _PeftType("SMT")


@dataclass
class SmtConfig(PeftConfig):
    """Sparse Matrix Tuning as a PEFT method: blocks of linear layers (`nn.Linear`, GPT-2's `Conv1D`), added to a frozen
    base.

    target_modules: names or endings of modules, a regular expression, or "all-linear"; None: the modules of `selection`
    where one is given, else "all-linear". exclude_modules, modules_to_save, trainable_token_indices: as everywhere in
    PEFT. init_weights: start at zero; False starts at random normal values, for tests.

    selection: where to train. A `Plan` (`thrifty.attach(model, "smt", ...).plan`, a delta's `plan`) or None; afterwards
    it is by module name {"of": shape of the weight, "block": shape of a block, "blocks": "0-3,7"}, the blocks numbered
    row by row, and is saved with the adapter. Targets that it does not name get blocks drawn by `seed`: each its share
    of `budget` by its size, and at least one.
    budget: a ceiling on the numbers drawn, as everywhere in thrifty: a share of the model's parameters (0.01, "1%") or
    a count. block_size: "auto", a size, "column", "row" or [rows, columns]; block_pattern: other sizes by module name,
    its ending or a regular expression.

    ThriftyError, a ValueError, where an option is not valid.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    init_weights: bool = True
    budget: float | int | str = 0.01
    block_size: int | str | list[int] = "auto"
    block_pattern: dict[str, int | str | list[int]] = field(default_factory=dict)
    seed: int = 0
    selection: dict[str, dict[str, Any]] | Plan | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SMT
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        Budget.parse(self.budget)
        for size in (self.block_size, *self.block_pattern.values()):
            block_shape(size, Target("", (1, 1)), numbers=1, of=1)
        if isinstance(self.selection, Plan):
            self.selection = _records_of(self.selection)
        elif not isinstance(self.selection, dict | None):
            raise ThriftyError(
                f"selection must be a Plan or what an adapter saved, not {type(self.selection).__name__}"
            )
        self.selection = dict(self.selection or {})

    def choose(self, targets: Mapping[str, Target], *, total: int) -> None:
        """Draw blocks for the `targets` (by module name) that have none yet. `total`: the numbers of the base model."""
        for pattern in self.block_pattern:
            if all(get_pattern_key([pattern], name) != pattern for name in targets):
                raise ThriftyError(
                    f"block_pattern: {unknown('target', pattern, {name.rpartition('.')[2] for name in targets})}"
                )
        assert isinstance(self.selection, dict)
        without = {name: target for name, target in targets.items() if name not in self.selection}
        if not without:
            return
        ceiling = Budget.parse(self.budget).of(total)
        of = sum(math.prod(target.shape) for target in without.values())
        grids = {name: block_shape(self._size(name), t, numbers=ceiling, of=of) for name, t in without.items()}
        for name, region in _draw(without, grids, ceiling=ceiling, seed=self.seed).items():
            self.selection[name] = _record(region, without[name].shape)

    def _size(self, name: str) -> BlockSize:
        return self.block_pattern.get(get_pattern_key(list(self.block_pattern), name), self.block_size)

    def region(self, name: str, shape: Sequence[int]) -> Blocks:
        """The blocks of module `name`, whose weight has `shape`; ThriftyError where the selection is of another."""
        assert isinstance(self.selection, dict)
        return _region(f"selection of {name}", self.selection[name], tuple(shape))


def _draw(
    targets: Mapping[str, Target], grids: Mapping[str, tuple[int, int]], *, ceiling: int, seed: int
) -> dict[str, Blocks]:
    """Random blocks under `ceiling` numbers, by size of the matrices; one where a share buys none."""
    generator = torch.Generator().manual_seed(seed)
    counts = {name: block_numbers(target.shape, grids[name]) for name, target in targets.items()}
    scores = {name: torch.rand(c.numel(), generator=generator, dtype=torch.float64) for name, c in counts.items()}
    chosen = pick(
        torch.cat(list(scores.values())),
        torch.cat([count.flatten() for count in counts.values()]),
        owner=torch.repeat_interleave(torch.tensor([count.numel() for count in counts.values()])),
        groups=list(targets),
        whole=[int(count.sum()) for count in counts.values()],
        scope="per_matrix",
        ceiling=ceiling,
    )
    regions, start = {}, 0
    for name, count in counts.items():
        here = chosen[(chosen >= start) & (chosen < start + count.numel())] - start
        start += count.numel()
        here = here if len(here) else scores[name].argmax()[None]
        regions[name] = Blocks(grids[name], torch.stack(torch.unravel_index(here, count.shape), dim=1))
    return regions


def _records_of(plan: Plan) -> dict[str, dict[str, Any]]:
    records = {}
    for name, region in plan.items():
        shape = plan.shapes[name]
        if not isinstance(region, Blocks) or len(shape) != 2 or not name.endswith(_WEIGHT):
            raise ThriftyError(
                f"selection: {name} of shape {shape} is trained as {region.kind}, and PEFT's SMT trains blocks of "
                "linear layers: choose with smt or random_blocks"
            )
        records[name.removesuffix(_WEIGHT)] = _record(region, shape)
    return records


def _grid(shape: Sequence[int], block: Sequence[int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _record(region: Blocks, shape: Sequence[int]) -> dict[str, Any]:
    numbers = region.index[:, 0] * _grid(shape, region.shape)[1] + region.index[:, 1]  # sorted, as the index is
    return {"of": list(shape), "block": list(region.shape), "blocks": _runs(numbers)}


def _runs(numbers: Tensor) -> str:
    """`0,2-5` of the sorted 0, 2, 3, 4, 5."""
    jumps = numbers.diff() != 1
    starts = torch.cat([numbers[:1], numbers[1:][jumps]]).tolist()
    ends = torch.cat([numbers[:-1][jumps], numbers[-1:]]).tolist()
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _region(what: str, record: Any, shape: tuple[int, ...]) -> Blocks:
    """The blocks that `record` describes, which may come from any file."""
    found: dict[str, Any] = record if isinstance(record, dict) else {}
    of, block, text = (found.get(key, []) for key in ("of", "block", "blocks"))
    for sizes in (of, block):
        if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
            raise ThriftyError(f"{what} is damaged: 'of' and 'block' must be two positive integers each, not {sizes!r}")
    if tuple(of) != shape:
        raise ThriftyError(
            f"{what} is for a weight {tuple(of)}, this one is {shape}: another model; make a new SmtConfig"
        )
    if not isinstance(text, str) or not re.fullmatch(_RUNS, text):
        raise ThriftyError(f"{what} is damaged: 'blocks' must be numbers and ranges such as '0-3,7'")
    grid, numbers, end = _grid(shape, block), [], -1
    for part in text.split(","):
        first, _, last = part.partition("-")
        start, before, end = int(first), end, int(last or first)
        if not before < start <= end < grid[0] * grid[1]:
            raise ThriftyError(
                f"{what} is damaged: {part!r} is not in order among the {grid[0] * grid[1]} blocks of a weight {shape}"
            )
        numbers.append(torch.arange(start, end + 1))
    index = torch.stack(torch.unravel_index(torch.cat(numbers), grid), dim=1)
    return Blocks((block[0], block[1]), index)
