"""Everything: every floating-point parameter of the model, whole."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..core.budget import Budget
from ..core.plan import Plan
from ..core.region import Whole
from .fixed import FixedSize

__all__ = ["Everything"]


@dataclass(frozen=True, kw_only=True)
class Everything(FixedSize):
    """All parameters. A budget beside it is only checked; where it `spends`, a schedule chooses by the budget later."""

    spends: bool = False

    def select(self, model: nn.Module, *, probe: object, budget: Budget | None, seed: int) -> Plan:
        return Plan.of(model, {n: Whole() for n, p in model.named_parameters() if p.is_floating_point() and p.numel()})
