"""Sensitive weights, those of highest score: single where a matrix has few, a low-rank pair where it has many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.budget import Budget
from ..core.entries import Entries
from ..core.errors import ThriftyError, unknown
from ..core.low_rank import LowRank
from ..core.plan import Plan
from ..core.region import Region
from .layers import Layers
from .probe import STATISTICS, Probe
from .targets import targets

__all__ = ["Sensitive"]


@dataclass(frozen=True, kw_only=True)
class Sensitive:
    """Of the weights of highest `score` in all matrices together, as many as the budget buys.

    A matrix that holds at least `threshold` times as many of them as a pair of rank `r` has numbers trains that pair;
    the others train their own single weights. Matrices that can take no pair (stacked experts, tied weights, sides
    shorter than `r`) train single weights only.
    """

    r: int = 8
    alpha: float = 16.0
    threshold: float = 1.0
    score: str = "squared_grad"
    target_modules: str | Sequence[str] = "all-linear"
    layers: Layers = None

    def __post_init__(self) -> None:
        if self.score not in STATISTICS:
            raise ThriftyError(unknown("score", str(self.score), STATISTICS))
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ThriftyError(f"r {self.r!r} is not valid: give a rank of 1 or more")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not self.alpha > 0:
            raise ThriftyError(f"alpha {self.alpha!r} is not valid: give a number above 0, such as 16")
        if not isinstance(self.threshold, int | float) or not 0 < self.threshold <= 1:
            raise ThriftyError(f"threshold {self.threshold!r} is not valid: give a share above 0 and at most 1")

    spends: ClassVar[bool] = True

    @property
    def statistics(self) -> frozenset[str]:
        return frozenset({self.score})

    def grids(self, model: nn.Module, budget: Budget | None) -> Mapping[str, tuple[int, int]]:
        return dict.fromkeys(targets(model, self.target_modules, layers=self.layers), (1, 1))

    def check(self, model: nn.Module, budget: Budget | None) -> None:
        """ThriftyError where no target matches, or the budget buys nothing."""
        targets(model, self.target_modules, layers=self.layers)
        if (budget or Budget(fraction=0.01)).numbers(model) < 1:
            raise ThriftyError(f"budget {budget} buys no weight: raise budget")

    def _pairs(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Numbers of a pair, for each matrix that can take one."""
        possible = targets(model, "all-linear")
        fitting = {n: s for n, s in shapes.items() if n in possible and len(s) == 2 and self.r <= min(s)}
        return {name: LowRank(self.r, self.alpha).size(shape) for name, shape in fitting.items()}

    def select(self, model: nn.Module, *, probe: Probe | None, budget: Budget | None, seed: int) -> Plan:
        """The plan: never more than the budget; ties go to the earlier weight."""
        self.check(model, budget)
        assert probe is not None
        limit = (budget or Budget(fraction=0.01)).numbers(model)
        shapes = {n: t.shape for n, t in targets(model, self.target_modules, layers=self.layers).items()}
        pairs = self._pairs(model, shapes)
        best: list[tuple[Tensor, Tensor, Tensor]] = []  # of each matrix: score, position, and what taking it adds
        for name in shapes:
            score = probe.mean(self.score, name, sizes=torch.ones(())).float().cpu().flatten()
            enough = max(1, int(self.threshold * pairs[name] + 0.5)) if name in pairs else limit
            index = torch.argsort(score, descending=True, stable=True)[: min(enough, limit)]
            cost = torch.ones(len(index), dtype=torch.int64)
            if len(index) == enough and name in pairs:
                cost[-1] += pairs[name] - enough
            best.append((score[index], index, cost))
        taken = _within([score for score, _, _ in best], [cost for _, _, cost in best], limit)
        regions: dict[str, Region] = {}
        for (name, count), (_, index, cost) in zip(zip(shapes, taken, strict=True), best, strict=True):
            if name in pairs and count and int(cost[:count].sum()) == pairs[name]:
                regions[name] = LowRank(self.r, float(self.alpha))
            elif count:
                regions[name] = Entries(index[:count])
        return Plan.of(model, regions)


def _within(scores: Sequence[Tensor], costs: Sequence[Tensor], limit: int) -> list[int]:
    """How many of each matrix's weights (best first) are taken, best first over all, at a cost of at most `limit`. A
    matrix whose pair does not fit stops before it."""
    room = [len(score) for score in scores]
    while True:
        owner = torch.cat([torch.full((n,), i) for i, n in enumerate(room)])
        score = torch.cat([score[:n] for score, n in zip(scores, room, strict=True)])
        order = torch.argsort(score, descending=True, stable=True)
        cost = torch.cat([cost[:n] for cost, n in zip(costs, room, strict=True)])[order]
        n = int((cost.cumsum(0) <= limit).sum())
        if n == len(order) or int(cost[n]) == 1:
            return torch.bincount(owner[order[:n]], minlength=len(room)).tolist()
        room[int(owner[order[n]])] -= 1
