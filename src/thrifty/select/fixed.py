"""What selectors share that choose the same amount whatever the budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import nn

from ..core.budget import Budget
from ..core.errors import ThriftyError
from ..core.plan import Plan

__all__ = ["FixedSize"]


class FixedSize(ABC):
    """A selector that looks at no gradient and whose size is its own: a budget beside it is only checked."""

    spends: bool = False

    @property
    def statistics(self) -> frozenset[str]:
        return frozenset()

    def grids(self, model: nn.Module, budget: Budget | None) -> Mapping[str, tuple[int, int]]:
        return {}

    @property
    def size_and_fix(self) -> tuple[str, str]:
        """What holds too many numbers, and how to have fewer."""
        return "whole tensors", "choose fewer, or take a method that fits it, such as smt"

    def check(self, model: nn.Module, budget: Budget | None) -> None:
        """ThriftyError for what `select` refuses, or where it holds over 5 % more than a budget that is given."""
        plan = self.select(model, probe=None, budget=None, seed=0)
        if budget is not None and not self.spends and plan.trainable_parameters > 1.05 * budget.numbers(model):
            what, fix = self.size_and_fix
            raise ThriftyError(
                f"{what} hold {plan.trainable_parameters:,} numbers, more than budget {budget} allows "
                f"({budget.numbers(model):,}): {fix}, or remove budget"
            )

    @abstractmethod
    def select(self, model: nn.Module, *, probe: object, budget: Budget | None, seed: int) -> Plan:
        """The plan; `seed` for what is drawn at random."""
