"""The blocks on the diagonal of each matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..core.budget import Budget
from ..core.errors import ThriftyError
from ..core.plan import Plan
from ..core.region import Blocks
from .layers import Layers
from .targets import targets

__all__ = ["Diagonal"]


@dataclass(frozen=True, kw_only=True)
class Diagonal:
    """`blocks` blocks on the diagonal of each `[out, in]`, each `ceil(out / blocks)` x `ceil(in / blocks)`; the last
    ones are smaller, or missing, where that does not divide. A budget beside it is only checked."""

    blocks: int = 64
    target_modules: str | Sequence[str] = "all-linear"
    layers: Layers = None

    def __post_init__(self) -> None:
        if isinstance(self.blocks, bool) or not isinstance(self.blocks, int) or self.blocks < 1:
            raise ThriftyError(f"blocks {self.blocks!r} is not valid: give how many lie on the diagonal, 64 for 1/64")

    spends: ClassVar[bool] = False

    @property
    def statistics(self) -> frozenset[str]:
        return frozenset()

    def grids(self, model: nn.Module, budget: Budget | None) -> Mapping[str, tuple[int, int]]:
        return {}

    def check(self, model: nn.Module, budget: Budget | None) -> None:
        """ThriftyError where a budget is given that the diagonals exceed by more than 5 %."""
        plan = self.select(model, probe=None, budget=None, seed=0)
        if budget is not None and plan.trainable_parameters > 1.05 * budget.numbers(model):
            raise ThriftyError(
                f"the diagonals hold {plan.trainable_parameters:,} numbers, more than budget {budget} allows "
                f"({budget.numbers(model):,}): raise blocks (now {self.blocks}), or remove budget"
            )

    def select(self, model: nn.Module, *, probe: object, budget: Budget | None, seed: int) -> Plan:
        regions = {}
        for name, target in targets(model, self.target_modules, layers=self.layers).items():
            out, columns = target.shape[-2:]
            h, w = -(-out // self.blocks), -(-columns // self.blocks)
            steps = torch.arange(min(-(-out // h), -(-columns // w)))
            index = torch.stack([steps, steps], 1)
            if len(target.shape) == 3:
                experts = torch.arange(target.shape[0]).repeat_interleave(len(steps))
                index = torch.cat([experts[:, None], index.repeat(target.shape[0], 1)], 1)
            regions[name] = Blocks((h, w), index)
        return Plan.of(model, regions)
