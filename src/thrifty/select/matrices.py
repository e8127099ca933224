"""Whole matrices: those that write an MLP's output, or named ones. Never a bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..core.budget import Budget
from ..core.plan import Plan
from ..core.region import Whole
from .attributed import mlp_outputs
from .fixed import FixedSize
from .layers import Layers
from .targets import targets

__all__ = ["Matrices"]


@dataclass(frozen=True, kw_only=True)
class Matrices(FixedSize):
    """All of each matrix; stacked experts count as one. A budget beside it is only checked.

    target_modules: None for what `mlp_outputs` finds; names as in `targets`. layers: see `in_layers`.
    """

    target_modules: str | Sequence[str] | None = None
    layers: Layers = None

    def select(self, model: nn.Module, *, probe: object, budget: Budget | None, seed: int) -> Plan:
        if self.target_modules is None:
            found = mlp_outputs(model, layers=self.layers)
        else:
            found = dict(targets(model, self.target_modules, layers=self.layers))
        return Plan.of(model, {name: Whole() for name in found})
