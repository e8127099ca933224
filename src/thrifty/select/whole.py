"""Everything: every floating-point parameter of the model, whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..core.budget import Budget
from ..core.errors import ThriftyError
from ..core.plan import Plan
from ..core.region import Whole

__all__ = ["Everything", "check_fits"]


def check_fits(plan: Plan, budget: Budget | None, model: nn.Module) -> None:
    """ThriftyError where whole tensors hold over 5 % more than a budget that is only checked."""
    if budget is not None and plan.trainable_parameters > 1.05 * budget.numbers(model):
        raise ThriftyError(
            f"whole tensors hold {plan.trainable_parameters:,} numbers, more than budget {budget} allows "
            f"({budget.numbers(model):,}): remove budget, or take a method that fits it, such as smt"
        )


@dataclass(frozen=True, kw_only=True)
class Everything:
    """All parameters. A budget beside it is only checked; where it `spends`, a schedule chooses by the budget later."""

    spends: bool = False

    @property
    def statistics(self) -> frozenset[str]:
        return frozenset()

    def grids(self, model: nn.Module, budget: Budget | None) -> Mapping[str, tuple[int, int]]:
        return {}

    def check(self, model: nn.Module, budget: Budget | None) -> None:
        """ThriftyError where a budget is given that the whole model exceeds by more than 5 %."""
        if not self.spends:
            check_fits(self.select(model, probe=None, budget=None, seed=0), budget, model)

    def select(self, model: nn.Module, *, probe: object, budget: Budget | None, seed: int) -> Plan:
        return Plan.of(model, {n: Whole() for n, p in model.named_parameters() if p.is_floating_point() and p.numel()})
