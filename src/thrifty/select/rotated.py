"""The MLP's matrices, each in the rotated basis of its type, with the largest gradients of each step trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..core.budget import Budget, share_of
from ..core.errors import ThriftyError
from ..core.plan import Plan, kind_of
from ..core.region import Region
from ..core.rotated import Basis, Rotated
from .layers import Layers
from .probe import Probe
from .sides import SIDES, SideSums
from .targets import Target, targets

__all__ = ["TopRotated"]

_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class TopRotated:
    """The same share of the numbers of each matrix, seen in the basis of its type.

    share: of each matrix (0.01, "1%"); None: what the budget buys, and 1% without one. target_modules: None for every
    matrix of the MLPs.
    """

    share: float | str | None = None
    target_modules: str | Sequence[str] | None = None
    layers: Layers = None

    def __post_init__(self) -> None:
        if self.share is not None:
            share_of(self.share, key="share")

    @property
    def spends(self) -> bool:
        return self.share is None

    @property
    def statistics(self) -> frozenset[str]:
        return frozenset({SIDES})

    def _targets(self, model: nn.Module) -> dict[str, Target]:
        if self.target_modules is not None:
            return dict(targets(model, self.target_modules, layers=self.layers))
        every = targets(model, "all-linear", layers=self.layers)
        found = {name: target for name, target in every.items() if kind_of(name) == "mlp"}
        if not found:
            raise ThriftyError(
                f"no matrix of {type(model).__name__} is seen to lie in an MLP: name them with target_modules"
            )
        return found

    def grids(self, model: nn.Module, budget: Budget | None) -> Mapping[str, tuple[int, int]]:
        return {name: (target.shape[-2], target.shape[-1]) for name, target in self._targets(model).items()}

    def _counts(self, model: nn.Module, budget: Budget | None) -> dict[str, int]:
        """By parameter, how many numbers a step trains."""
        sizes = {name: math.prod(target.shape) for name, target in self._targets(model).items()}
        whole, limit = sum(sizes.values()), None if budget is None else budget.numbers(model)
        if self.share is not None:
            share = share_of(self.share, key="share")
        else:
            share = _SHARE if limit is None else min(1.0, limit / whole)
        counts = {name: int(share * size + 1e-9) for name, size in sizes.items()}
        if not all(counts.values()):
            least = 1 / min(sizes.values())
            fix = f"budget to at least {int(least * whole) + 1}" if self.spends else f"share to at least {least:.3g}"
            raise ThriftyError(f"{fix.split()[0]} buys no number of each of {len(sizes)} matrices: raise {fix}")
        if limit is not None and sum(counts.values()) > 1.05 * limit:
            raise ThriftyError(
                f"share {self.share} trains {sum(counts.values()):,} numbers in each step, more than budget {budget} "
                f"allows ({limit:,}): lower share, or remove it or budget"
            )
        return counts

    def check(self, model: nn.Module, budget: Budget | None) -> None:
        """ThriftyError where no matrix is found, or the share is below one number or above the budget."""
        self._counts(model, budget)

    def select(self, model: nn.Module, *, probe: Probe | None, budget: Budget | None, seed: int) -> Plan:
        assert probe is not None
        made: dict[SideSums, Basis] = {}
        regions: dict[str, Region] = {}
        for name, count in self._counts(model, budget).items():
            sums = probe.sides[name]
            if sums not in made:
                made[sums] = sums.basis(name)
            regions[name] = Rotated(made[sums], count)
        return Plan.of(model, regions)
