"""Matrices chosen whole, each as a low-rank pair."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..core.budget import Budget
from ..core.errors import ThriftyError
from ..core.low_rank import LowRank
from ..core.method import Selector
from ..core.plan import Plan
from ..core.region import Region, Whole
from .fixed import FixedSize
from .targets import targets

__all__ = ["Pairs"]

_ADVICE = "select matrices of linear layers, such as {tensors: {only: weights, target_modules: [q_proj, v_proj]}}"


@dataclass(frozen=True, kw_only=True)
class Pairs(FixedSize):
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

    @property
    def size_and_fix(self) -> tuple[str, str]:
        return f"low-rank pairs of rank {self.r}", "lower r, choose fewer matrices"

    def select(self, model: nn.Module, *, probe: object, budget: Budget | None, seed: int) -> Plan:
        whole = self.of.select(model, probe=probe, budget=None, seed=seed)
        possible = targets(model, "all-linear")
        regions: dict[str, Region] = {}
        for name, region in whole.items():
            if not isinstance(region, Whole) or name not in possible or len(whole.shapes[name]) != 2:
                raise ThriftyError(f"low_rank cannot train {name} (shape {whole.shapes[name]}): {_ADVICE}")
            regions[name] = LowRank(self.r, float(self.alpha))
        return Plan.of(model, regions)
