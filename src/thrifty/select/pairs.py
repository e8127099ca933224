"""Matrices chosen whole, each as a low-rank pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..core.budget import Budget
from ..core.errors import ThriftyError
from ..core.low_rank import LowRank
from ..core.method import Selector
from ..core.plan import Plan
from ..core.region import Region, Whole
from .targets import targets

__all__ = ["Pairs"]

_ADVICE = "select matrices of linear layers, such as {tensors: {only: weights, target_modules: [q_proj, v_proj]}}"


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The whole matrices that `of` selects, each with a pair of rank `r`. A budget beside it is only checked."""

    of: Selector
    r: int
    alpha: float

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ThriftyError(f"r {self.r!r} is not valid: give a rank of 1 or more")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not self.alpha > 0:
            raise ThriftyError(f"alpha {self.alpha!r} is not valid: give a number above 0, such as 16")
        if self.of.spends:
            raise ThriftyError(f"low_rank trains whole matrices, not parts of them: {_ADVICE}")

    spends: ClassVar[bool] = False

    @property
    def statistics(self) -> frozenset[str]:
        return frozenset()

    def grids(self, model: nn.Module, budget: Budget | None) -> Mapping[str, tuple[int, int]]:
        return {}

    def check(self, model: nn.Module, budget: Budget | None) -> None:
        """ThriftyError where a tensor can have no pair, or the pairs exceed the budget by more than 5 %."""
        plan = self.select(model, probe=None, budget=None, seed=0)
        if budget is not None and plan.trainable_parameters > 1.05 * budget.numbers(model):
            raise ThriftyError(
                f"low-rank pairs of rank {self.r} hold {plan.trainable_parameters:,} numbers, more than budget "
                f"{budget} allows ({budget.numbers(model):,}): lower r, choose fewer matrices, or remove budget"
            )

    def select(self, model: nn.Module, *, probe: object, budget: Budget | None, seed: int) -> Plan:
        whole = self.of.select(model, probe=probe, budget=None, seed=seed)
        possible = targets(model, "all-linear")
        regions: dict[str, Region] = {}
        for name, region in whole.items():
            if not isinstance(region, Whole) or name not in possible or len(whole.shapes[name]) != 2:
                raise ThriftyError(f"low_rank cannot train {name} (shape {whole.shapes[name]}): {_ADVICE}")
            regions[name] = LowRank(self.r, float(self.alpha))
        return Plan.of(model, regions)
