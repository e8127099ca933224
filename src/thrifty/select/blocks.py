"""Blocks by score: cut every candidate matrix into blocks and keep the best that the budget buys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.budget import Budget
from ..core.errors import ThriftyError, unknown
from ..core.plan import Plan, kind_of
from ..core.region import Blocks, Region
from .probe import STATISTICS, Probe
from .targets import Target, targets

__all__ = ["AUTO_SIZES", "SCOPES", "BlockSize", "TopBlocks", "auto_block_size", "block_shape"]

BlockSize = int | str | Sequence[int]
AUTO_SIZES = (256, 128, 64, 32, 16)
SCOPES = ("global", "per_kind", "per_matrix")
_RANDOM = "random"


def auto_block_size(numbers: int) -> int:
    """The largest of 256, 128, 64, 32, 16 with which `numbers` buys at least 256 blocks, else 16."""
    return next((size for size in AUTO_SIZES if numbers // size**2 >= 256), AUTO_SIZES[-1])


def block_shape(block_size: BlockSize, target: Target, *, numbers: int) -> tuple[int, int]:
    """The stored shape `(h, w)` of a block; `column` is one input, `row` one output, `[rows, columns]` outputs x
    inputs."""
    out, columns = target.out_in
    if block_size == "auto":
        block_size = auto_block_size(numbers)
    if block_size == "column":
        shape = (out, 1)
    elif block_size == "row":
        shape = (1, columns)
    elif isinstance(block_size, int) and not isinstance(block_size, bool) and block_size >= 1:
        shape = (block_size, block_size)
    elif (
        not isinstance(block_size, str | int)
        and len(block_size) == 2
        and all(isinstance(n, int) and n >= 1 for n in block_size)
    ):
        shape = (block_size[0], block_size[1])
    else:
        raise ThriftyError(
            f"block_size {block_size!r} is not valid: "
            "give 'auto', 'column', 'row', a size such as 64, or [rows, columns]"
        )
    shape = (min(shape[0], out), min(shape[1], columns))
    return (shape[1], shape[0]) if target.transposed else shape


def _block_numbers(shape: tuple[int, ...], grid: tuple[int, int]) -> Tensor:
    """How many numbers each block holds, int64 `[..., block rows, block columns]`."""
    h, w = grid
    rows = torch.tensor([min(h, shape[-2] - i) for i in range(0, shape[-2], h)])
    columns = torch.tensor([min(w, shape[-1] - j) for j in range(0, shape[-1], w)])
    return (rows[:, None] * columns).expand(*shape[:-2], len(rows), len(columns))


def _best(scores: Tensor, sizes: Tensor, ceiling: int) -> Tensor:
    """Positions of the best blocks, best first, as many as fit under `ceiling` (ties: the earlier block)."""
    order = torch.argsort(scores, descending=True, stable=True)
    spent = sizes[order].cumsum(0)
    n = int((spent <= ceiling).sum())
    left = ceiling - (int(spent[n - 1]) if n else 0)
    kept, smallest = [order[:n]], int(sizes.min()) if len(sizes) else 0
    for position in order[n:]:  # what is left buys no block of full size: at most the smaller ones of an edge
        if left < smallest:
            break
        if int(sizes[position]) <= left:
            left -= int(sizes[position])
            kept.append(position[None])
    return torch.cat(kept)


def _best_per_matrix(scores: Tensor, sizes: Tensor, matrix: Tensor, ceiling: int) -> Tensor:
    """The best of each matrix in proportion to its size, at least one each while the ceiling allows."""
    total, kept, extra = int(sizes.sum()), [], []
    for m in matrix.unique().tolist():
        here = (matrix == m).nonzero()[:, 0]
        share = ceiling * int(sizes[here].sum()) // total
        best = here[_best(scores[here], sizes[here], share)]
        kept.append(best)
        extra.append((len(best) > 0, int(sizes[best].sum()) - share, m))
    left = ceiling - sum(int(sizes[k].sum()) for k in kept)
    taken = torch.cat(kept)
    for _, _, m in sorted(extra):  # matrices without a block first, then those furthest below their share
        fitting = ((matrix == m) & (sizes <= left)).nonzero()[:, 0]
        fitting = fitting[~torch.isin(fitting, taken)]
        if len(fitting):
            position = fitting[torch.argmax(scores[fitting])]
            left -= int(sizes[position])
            kept.append(position[None])
    return torch.cat(kept)


@dataclass(frozen=True, kw_only=True)
class TopBlocks:
    """The blocks with the highest `score`, chosen under the budget within each `scope`.

    score: `abs_grad` mean |g| over units and numbers (the paper's), `signed_grad` |mean g|, `squared_grad` mean g²,
    `weight_times_grad` mean |w g|, `random` (seeded, no probe). scope: `global`; `per_kind` (attention, MLP, others,
    each its share of the budget by size); `per_matrix`.
    """

    score: str = "abs_grad"
    scope: str = "global"
    block_size: BlockSize = "auto"
    target_modules: str | Sequence[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.score not in STATISTICS and self.score != _RANDOM:
            raise ThriftyError(unknown("score", str(self.score), [*STATISTICS, _RANDOM]))
        if self.scope not in SCOPES:
            raise ThriftyError(unknown("scope", str(self.scope), SCOPES))
        block_shape(self.block_size, Target("", (1, 1)), numbers=1)

    @property
    def statistics(self) -> frozenset[str]:
        return frozenset() if self.score == _RANDOM else frozenset({self.score})

    def grids(self, model: nn.Module, budget: Budget | None) -> Mapping[str, tuple[int, int]]:
        numbers = (budget or Budget(fraction=0.01)).numbers(model)
        chosen = targets(model, self.target_modules)
        return {name: block_shape(self.block_size, target, numbers=numbers) for name, target in chosen.items()}

    def check(self, model: nn.Module, budget: Budget | None) -> None:
        """ThriftyError where no target matches or the budget buys no block; before any gradient is taken."""
        budget = budget or Budget(fraction=0.01)
        parameters = dict(model.named_parameters())
        grids = self.grids(model, budget)
        smallest = min(int(_block_numbers(tuple(parameters[n].shape), g).min()) for n, g in grids.items())
        if smallest > budget.numbers(model):
            raise ThriftyError(
                f"budget {budget} ({budget.numbers(model):,} numbers) buys no block, the smallest holds {smallest:,}: "
                f"raise budget to at least {smallest} or lower block_size"
            )

    def select(self, model: nn.Module, *, probe: Probe | None, budget: Budget | None, seed: int) -> Plan:
        """The plan: best blocks first, never more than the budget."""
        self.check(model, budget)
        budget = budget or Budget(fraction=0.01)
        parameters, grids = dict(model.named_parameters()), self.grids(model, budget)
        counts = {name: _block_numbers(tuple(parameters[name].shape), grid) for name, grid in grids.items()}
        generator = torch.Generator().manual_seed(seed)
        scores = []
        for name, count in counts.items():
            if self.score == _RANDOM:
                scores.append(torch.rand(count.shape, generator=generator, dtype=torch.float64))
            else:
                assert probe is not None
                scores.append(probe.mean(self.score, name, sizes=count.to(parameters[name].device)).cpu())
        picked = self._pick(torch.cat([s.flatten() for s in scores]), counts, ceiling=budget.numbers(model))
        if not len(picked):
            raise ThriftyError(
                f"budget {budget}, split by scope {self.scope!r}, buys no block: raise budget, lower block_size, "
                "or use scope 'global'"
            )
        regions: dict[str, Region] = {}
        start = 0
        for name, count in counts.items():
            here = picked[(picked >= start) & (picked < start + count.numel())] - start
            start += count.numel()
            if len(here):
                regions[name] = Blocks(grids[name], torch.stack(torch.unravel_index(here, count.shape), dim=1))
        return Plan.of(model, regions)

    def _pick(self, scores: Tensor, counts: Mapping[str, Tensor], *, ceiling: int) -> Tensor:
        sizes = torch.cat([count.flatten() for count in counts.values()])
        if self.scope == "global":
            return _best(scores, sizes, ceiling)
        number = {name: i for i, name in enumerate(counts)}
        matrix = torch.cat([torch.full((count.numel(),), number[name]) for name, count in counts.items()])
        if self.scope == "per_matrix":
            return _best_per_matrix(scores, sizes, matrix, ceiling)
        kinds = {
            kind: torch.tensor([i for n, i in number.items() if kind_of(n) == kind]) for kind in map(kind_of, counts)
        }
        kept = []
        for members in kinds.values():
            here = torch.isin(matrix, members).nonzero()[:, 0]
            share = ceiling * int(sizes[here].sum()) // int(sizes.sum())
            kept.append(here[_best(scores[here], sizes[here], share)])
        return torch.cat(kept)
