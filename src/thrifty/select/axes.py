"""The main axes of each matrix's gradient, as many as the budget buys a core for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.budget import Budget
from ..core.errors import ThriftyError
from ..core.plan import Plan
from ..core.projected import Projected
from ..core.region import Region
from .entry_sums import ENTRY_GRID, EntrySums
from .layers import Layers
from .probe import Probe
from .targets import Target, targets

__all__ = ["GradientAxes"]

_STATISTIC = "signed_grad"  # of single numbers: its sums are those of the gradient itself


@dataclass(frozen=True, kw_only=True)
class GradientAxes:
    """The same number r of left and of right singular vectors of the mean gradient in each matrix (all of them where a
    side is shorter), r x r numbers to train.

    r: None for the largest that the budget buys. Stacked experts are left out: only matrices of linear layers have
    a core.
    """

    r: int | None = None
    target_modules: str | Sequence[str] = "all-linear"
    layers: Layers = None

    def __post_init__(self) -> None:
        if self.r is not None and (isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1):
            raise ThriftyError(f"r {self.r!r} is not valid: give a rank of 1 or more, or leave it to the budget")

    @property
    def spends(self) -> bool:
        return self.r is None

    @property
    def statistics(self) -> frozenset[str]:
        return frozenset({_STATISTIC})

    def _targets(self, model: nn.Module) -> dict[str, Target]:
        every = targets(model, self.target_modules, layers=self.layers)
        found = {name: target for name, target in every.items() if len(target.shape) == 2}
        if not found:
            raise ThriftyError(
                f"target_modules {self.target_modules!r} holds stacked experts alone, which have no axes"
            )
        return found

    def grids(self, model: nn.Module, budget: Budget | None) -> Mapping[str, tuple[int, int]]:
        return dict.fromkeys(self._targets(model), ENTRY_GRID)

    def _rank(self, found: Mapping[str, Target], model: nn.Module, budget: Budget | None) -> int:
        limit = (budget or Budget(fraction=0.01)).numbers(model)
        if self.r is not None:
            if budget is not None and _numbers(found, self.r) > 1.05 * limit:
                raise ThriftyError(
                    f"cores of rank {self.r} hold {_numbers(found, self.r):,} numbers, more than budget {budget} "
                    f"allows ({limit:,}): lower r, or remove it or budget"
                )
            return self.r
        largest = max(max(target.shape) for target in found.values())
        r = 0
        while r < largest and _numbers(found, r + 1) <= limit:
            r += 1
        if not r:
            raise ThriftyError(
                f"budget {budget} ({limit:,} numbers) does not buy one number for each of {len(found)} matrices: "
                f"raise budget to at least {len(found)}, or choose fewer target_modules"
            )
        return r

    def check(self, model: nn.Module, budget: Budget | None) -> None:
        """ThriftyError where no matrix matches, or the budget buys no core, or less than `r` asks for."""
        self._rank(self._targets(model), model, budget)

    def cores(self, model: nn.Module, budget: Budget | None) -> dict[str, tuple[int, int]]:
        """The shape of each matrix's core: whatever the gradient is."""
        found = self._targets(model)
        r = self._rank(found, model, budget)
        return {name: (min(r, target.shape[0]), min(r, target.shape[1])) for name, target in found.items()}

    def select(self, model: nn.Module, *, probe: Probe | None, budget: Budget | None, seed: int) -> Plan:
        """The plan: never more than the budget."""
        assert probe is not None
        found = self._targets(model)
        r = self._rank(found, model, budget)
        regions: dict[str, Region] = {}
        for name in found:
            sums = probe.sums[_STATISTIC][name]
            assert isinstance(sums, EntrySums)
            regions[name] = Projected(*_axes(name, sums.read(), r, seed=seed))
        return Plan.of(model, regions)


def _numbers(found: Mapping[str, Target], r: int) -> int:
    return sum(min(r, target.shape[0]) * min(r, target.shape[1]) for target in found.values())


def _axes(name: str, gradient: Tensor, r: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """The leading singular vectors of `gradient` `[rows, columns]`: `[rows, m]` and `[n, columns]`, orthonormal. By
    randomized SVD (Halko et al. 2011). Longer than the other side where r is: then any that are orthogonal to these."""
    if not bool(torch.isfinite(gradient).all()):
        raise ThriftyError(
            f"the probe's gradient of {name} is not finite: the loss overflows on this data; "
            "try dtype float32, or look for broken rows"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, _, v = torch.svd_lowrank(gradient, q=min(r + 8, *gradient.shape), niter=2)
        sides = []
        for side in (u, v):
            more = min(r, len(side)) - side.shape[1]
            if more > 0:
                side = torch.cat([side, torch.randn(len(side), more)], dim=1)
            sides.append(torch.linalg.qr(side[:, : min(r, len(side))])[0])
    return sides[0].contiguous(), sides[1].t().contiguous()
