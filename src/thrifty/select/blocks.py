"""Blocks by score: cut every candidate matrix into blocks and keep the best that the budget buys."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.budget import Budget, share_of
from ..core.errors import ThriftyError, unknown
from ..core.plan import Plan
from ..core.region import Blocks, Region
from .inputs import Input, kept_inputs, same_inputs, strip_linears
from .layers import Layers
from .pick import SCOPES, check_order, group_of, pick
from .probe import INPUT_STATISTICS, STATISTICS, Probe, check_inputs
from .spread import spread_scores
from .strip_first import Strips, check_input_budget, columns_of
from .targets import Target, targets

__all__ = ["AUTO_SIZES", "SCOPES", "BlockSize", "TopBlocks", "auto_block_size", "block_numbers", "block_shape"]

BlockSize = int | str | Sequence[int]
AUTO_SIZES = (256, 128, 64, 32, 16)
_RANDOM, _OVER_INPUT = "random", "grad_over_input"
_SCORES = (*STATISTICS, *INPUT_STATISTICS, _OVER_INPUT)
_log = logging.getLogger("thrifty")


def auto_block_size(numbers: int) -> int:
    """The largest of 256, 128, 64, 32, 16 with which `numbers` buys at least 256 blocks, else 16."""
    return next((size for size in AUTO_SIZES if numbers // size**2 >= 256), AUTO_SIZES[-1])


def block_shape(block_size: BlockSize, target: Target, *, numbers: int, of: int) -> tuple[int, int]:
    """The stored shape `(h, w)` of a block; `column` is one input, `row` one output, `[rows, columns]` outputs x
    inputs, `even` as large a share of the outputs and of the inputs as `numbers` is of all candidates, `of`."""
    out, columns = target.out_in
    if block_size == "even":
        block_size = [max(1, round(numbers / of * side)) for side in (out, columns)]
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
            "give 'auto', 'even', 'column', 'row', a size such as 64, or [rows, columns]"
        )
    shape = (min(shape[0], out), min(shape[1], columns))
    return (shape[1], shape[0]) if target.transposed else shape


def block_numbers(shape: tuple[int, ...], grid: tuple[int, int]) -> Tensor:
    """How many numbers each block holds, int64 `[..., block rows, block columns]`."""
    h, w = grid
    rows = torch.tensor([min(h, shape[-2] - i) for i in range(0, shape[-2], h)])
    columns = torch.tensor([min(w, shape[-1] - j) for j in range(0, shape[-1], w)])
    return (rows[:, None] * columns).expand(*shape[:-2], len(rows), len(columns))


@dataclass(frozen=True, kw_only=True)
class TopBlocks:
    """The blocks with the highest `score`, chosen under the budget within each `scope`.

    score: `abs_grad` mean |g| over units and numbers, `accumulated_grad` mean over numbers of |mean g over units| (the
    paper's), `signed_grad` |mean g|, `squared_grad` mean g², `weight_times_grad` mean |w g|, `input_norm` mean norm of
    the input columns over all tokens, `weight_times_input` mean |w| times that norm (linear layers alone, no backward),
    `grad_over_input` mean |g| over that norm (a large input enlarges a weight's gradient and what its step does alike),
    `random` (seeded, no probe). order: `highest`, or `lowest` for the smallest scores. scope: `global`; `per_kind`
    (attention, MLP, others), `per_layer` (those outside the layers together) or `per_matrix`, each its share of the
    budget by the size of its candidates.

    input_budget: None, or a share (0.1, "10%") of all distinct input columns of the target linear layers, which
    backward may keep. Then strips of an input, as wide as a block, come first, by the sum of the statistic over all
    matrices that read the input, within the same scope (of inputs for `per_matrix`); then blocks inside them. Stacked
    experts, tied weights and the output head keep their whole input in any case: their blocks are not restricted.

    spread: within each matrix every strip of outputs and of inputs gets a block before any gets a second (`spread.py`).
    """

    score: str = "abs_grad"
    scope: str = "global"
    block_size: BlockSize = "auto"
    target_modules: str | Sequence[str] = "all-linear"
    input_budget: float | str | None = None
    layers: Layers = None
    order: str = "highest"
    spread: bool = False

    def __post_init__(self) -> None:
        if self.score not in (*_SCORES, _RANDOM):
            raise ThriftyError(unknown("score", str(self.score), [*_SCORES, _RANDOM]))
        if self.scope not in SCOPES:
            raise ThriftyError(unknown("scope", str(self.scope), SCOPES))
        check_order(self.order)
        if self.spread and (self.scope != "per_matrix" or self.input_budget is not None):
            raise ThriftyError("spread places blocks in each matrix: it needs scope per_matrix, and no input_budget")
        block_shape(self.block_size, Target("", (1, 1)), numbers=1, of=1)
        if self.input_budget is not None:
            share_of(self.input_budget, key="input_budget")

    spends: ClassVar[bool] = True

    @property
    def statistics(self) -> frozenset[str]:
        several = {_RANDOM: (), _OVER_INPUT: ("abs_grad", "input_norm")}
        return frozenset(several.get(self.score, (self.score,)))

    def grids(self, model: nn.Module, budget: Budget | None) -> Mapping[str, tuple[int, int]]:
        numbers = (budget or Budget(fraction=0.01)).numbers(model)
        chosen = targets(model, self.target_modules, layers=self.layers)
        of = sum(math.prod(target.shape) for target in chosen.values())
        return {name: block_shape(self.block_size, target, numbers=numbers, of=of) for name, target in chosen.items()}

    def check(self, model: nn.Module, budget: Budget | None) -> None:
        """ThriftyError where no target matches or a budget buys nothing; before any gradient is taken."""
        budget = budget or Budget(fraction=0.01)
        parameters = dict(model.named_parameters())
        grids = self.grids(model, budget)
        smallest = min(int(block_numbers(tuple(parameters[n].shape), g).min()) for n, g in grids.items())
        if smallest > budget.numbers(model):
            raise ThriftyError(
                f"budget {budget} ({budget.numbers(model):,} numbers) buys no block, the smallest holds {smallest:,}: "
                f"raise budget to at least {smallest} or lower block_size"
            )
        if self.statistics & set(INPUT_STATISTICS):
            check_inputs(model, grids)
        if self.input_budget is not None:  # at most this many columns: some of these inputs may be the same
            alone = [Input((target,)) for _, target in strip_linears(model, grids).values()]
            check_input_budget(self._input_share, alone, grids)

    @property
    def _input_share(self) -> float:
        return share_of(self.input_budget, key="input_budget")

    def select(self, model: nn.Module, *, probe: Probe | None, budget: Budget | None, seed: int) -> Plan:
        """The plan: best blocks first, never more than the budgets."""
        self.check(model, budget)
        budget = budget or Budget(fraction=0.01)
        parameters, grids = dict(model.named_parameters()), self.grids(model, budget)
        counts = {name: block_numbers(tuple(parameters[name].shape), grid) for name, grid in grids.items()}
        chosen = targets(model, self.target_modules, layers=self.layers)
        generator = torch.Generator().manual_seed(seed)
        scores: dict[str, Tensor] = {}
        total = sum(int(count.sum()) for count in counts.values())
        for name, count in counts.items():
            if self.score == _RANDOM:
                scores[name] = torch.rand(count.shape, generator=generator, dtype=torch.float64)
            else:
                assert probe is not None
                mean = self._mean(probe, chosen[name], parameters[name], grid=grids[name], count=count)
                scores[name] = -mean if self.order == "lowest" else mean
            if self.spread:
                scores[name] = spread_scores(scores[name], share=budget.numbers(model) / total)
        inputs: Sequence[Input] = () if probe is None else probe.inputs
        inside = {name: torch.ones(count.shape, dtype=torch.bool) for name, count in counts.items()}
        if self.input_budget is not None:
            inputs = same_inputs(model, grids) if probe is None else inputs
            means = generator if self.score == _RANDOM else scores
            strips = Strips.of(inputs, grids=grids, counts=counts, means=means, scope=self.scope)
            inside = self._inside(strips, budget=budget, numbers=budget.numbers(model))
        picked = self._pick(scores, counts, inside, ceiling=budget.numbers(model))
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
        plan = Plan.of(model, regions)
        return Plan.of(model, regions, kept_columns=kept_inputs(plan, inputs)) if inputs else plan

    def _mean(self, probe: Probe, target: Target, weight: Tensor, *, grid: tuple[int, int], count: Tensor) -> Tensor:
        """The score of each block, on the CPU; `count` numbers are in it."""
        if self.score in INPUT_STATISTICS:
            return probe.of_inputs(self.score, target, weight, grid=grid).cpu() / count
        if self.score == _OVER_INPUT:
            norms = probe.of_inputs("input_norm", target, weight, grid=grid).cpu() / count
            return (probe.mean("abs_grad", target.name, sizes=count).cpu() / norms).nan_to_num(0.0, posinf=0.0)
        return probe.mean(self.score, target.name, sizes=count).cpu()

    def _inside(self, strips: Strips, *, budget: Budget, numbers: int) -> dict[str, Tensor]:
        """By parameter, the blocks inside the chosen strips; warns where they hold less than the budget."""
        check_input_budget(self._input_share, strips.inputs, strips.grids)
        columns = columns_of(strips.inputs, self._input_share)
        wanted = min(numbers, sum(int(count.sum()) for count in strips.counts.values()))
        if (room := strips.room(columns)) < wanted:
            _log.warning(
                "input_budget %g%% keeps strips that hold %s of the %s numbers that budget %s allows: all of those are "
                "trained; to spend the whole budget raise input_budget to %s",
                100 * self._input_share,
                f"{room:,}",
                f"{wanted:,}",
                budget,
                strips.smallest(wanted),
            )
        inside = strips.inside(columns)
        without = [name for name, here in inside.items() if not bool(here.any())]
        if without and self.scope == "per_matrix":
            _log.warning(
                "input_budget %g%% buys no strip for the inputs of %d of %d matrices, first %s: they are not trained; "
                "raise input_budget or lower the columns of block_size",
                100 * self._input_share,
                len(without),
                len(inside),
                without[0],
            )
        return inside

    def _pick(
        self, scores: Mapping[str, Tensor], counts: Mapping[str, Tensor], inside: Mapping[str, Tensor], *, ceiling: int
    ) -> Tensor:
        """Positions among all blocks, matrix after matrix."""
        allowed = torch.cat([inside[name].flatten() for name in counts]).nonzero()[:, 0]
        owner = torch.repeat_interleave(torch.tensor([count.numel() for count in counts.values()]))
        chosen = pick(
            torch.cat([scores[name].flatten() for name in counts])[allowed],
            torch.cat([count.flatten() for count in counts.values()])[allowed],
            owner=owner[allowed],
            groups=[group_of(name, self.scope) for name in counts],
            whole=[int(count.sum()) for count in counts.values()],
            scope=self.scope,
            ceiling=ceiling,
        )
        return allowed[chosen]
