"""Strip-first: the input columns that backward may keep, chosen before the blocks that must lie in them.

A strip is a run of columns, as wide as a block, of one input; all matrices that read the input share it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import ThriftyError
from .inputs import Input
from .pick import group_of, pick

__all__ = ["Strips", "check_input_budget", "columns_of"]


def check_input_budget(fraction: float, inputs: Sequence[Input], grids: Mapping[str, tuple[int, int]]) -> None:
    """ThriftyError where `fraction` of the distinct columns of `inputs` is less than the narrowest strip."""
    if not inputs:
        raise ThriftyError(
            "input_budget: no target module is a linear layer that can keep less than its whole input "
            "(stacked experts, tied weights and embeddings cannot): remove input_budget or change target_modules"
        )
    total, narrowest = columns_of(inputs), min(int(_widths(one, grids).min()) for one in inputs)
    if columns_of(inputs, fraction) < narrowest:
        raise ThriftyError(
            f"input_budget {100 * fraction:g}% ({columns_of(inputs, fraction)} of {total:,} input columns) buys no "
            f"strip, the narrowest has {narrowest}: raise input_budget to at least {_percent(narrowest, total)} or "
            "lower the columns of block_size"
        )


def columns_of(inputs: Sequence[Input], fraction: float = 1.0) -> int:
    """How many columns `fraction` of all distinct ones is, rounded down."""
    return int(fraction * sum(one.columns for one in inputs) + 1e-9)


def _widths(one: Input, grids: Mapping[str, tuple[int, int]]) -> Tensor:
    """Columns of each strip of an input, int64 `[strips]`: as many as a block has, fewer in the last."""
    target = one.matrices[0]
    width = grids[target.name][0 if target.transposed else 1]
    return torch.tensor([min(width, one.columns - start) for start in range(0, one.columns, width)])


def _percent(columns: int, total: int) -> str:
    """The smallest share in thousandths of a percent that allows `columns`."""
    return f"{math.ceil(1e5 * columns / total) / 1e3:g}%"


@dataclass(frozen=True, kw_only=True)
class Strips:
    """The strips of all `inputs`, one input after the other, and what each is worth.

    grids: the stored shape of a block by parameter. counts: how many numbers each block holds, by parameter. scores:
    `[strips]`. Blocks of parameters that are in no input are free.
    """

    inputs: Sequence[Input]
    grids: Mapping[str, tuple[int, int]]
    counts: Mapping[str, Tensor]
    scores: Tensor
    scope: str

    @classmethod
    def of(
        cls,
        inputs: Sequence[Input],
        *,
        grids: Mapping[str, tuple[int, int]],
        counts: Mapping[str, Tensor],
        means: Mapping[str, Tensor] | torch.Generator,
        scope: str,
    ) -> Strips:
        """Scored by a statistic, or at random where `means` is a generator.

        means: the statistic's mean over each block, by parameter. A strip's score is its sum over all outputs of all
        matrices that read the input, per column kept.
        """
        scores = []
        for one in inputs:
            widths = _widths(one, grids)
            if isinstance(means, torch.Generator):
                scores.append(torch.rand(len(widths), generator=means, dtype=torch.float64))
                continue
            total = torch.zeros(len(widths), dtype=torch.float64)
            for target in one.matrices:
                total += (means[target.name] * counts[target.name]).sum(1 if target.transposed else 0)
            scores.append(total / widths)
        return cls(inputs=inputs, grids=grids, counts=counts, scores=torch.cat(scores), scope=scope)

    def inside(self, columns: int) -> dict[str, Tensor]:
        """By parameter, which blocks lie in the best strips of at most `columns` in all: bool, as `counts`."""
        widths = [_widths(one, self.grids) for one in self.inputs]
        chosen = torch.zeros(len(self.scores), dtype=torch.bool)
        chosen[
            pick(
                self.scores,
                torch.cat(widths),
                owner=torch.repeat_interleave(torch.tensor([len(w) for w in widths])),
                groups=["+".join(sorted({group_of(t.name, self.scope) for t in one.matrices})) for one in self.inputs],
                whole=[one.columns for one in self.inputs],
                scope=self.scope,
                ceiling=columns,
            )
        ] = True
        found = {name: torch.ones(count.shape, dtype=torch.bool) for name, count in self.counts.items()}
        for one, strips in zip(self.inputs, chosen.split([len(w) for w in widths]), strict=True):
            for target in one.matrices:
                found[target.name] &= strips[:, None] if target.transposed else strips
        return found

    def room(self, columns: int) -> int:
        """How many numbers lie in the best strips of at most `columns` in all, with those that are free."""
        inside = self.inside(columns)
        return sum(int(count[inside[name]].sum()) for name, count in self.counts.items())

    def smallest(self, numbers: int) -> str:
        """A share of the columns whose strips hold `numbers`, found by halving: about the smallest."""
        low, high = 1, columns_of(self.inputs)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.room(middle) >= numbers else (middle + 1, high)
        return _percent(high, columns_of(self.inputs))
