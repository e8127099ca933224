"""Entries by score: the best single numbers of the candidate matrices that the budget buys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.budget import Budget
from ..core.entries import Entries
from ..core.errors import ThriftyError, unknown
from ..core.plan import Plan
from ..core.region import Region
from .entry_sums import ENTRY_GRID
from .layers import Layers
from .pick import SCOPES, check_order, group_of, shares
from .probe import INPUT_STATISTICS, STATISTICS, Probe, check_inputs
from .targets import Target, targets

__all__ = ["ENTRY_SCOPES", "BestEntries", "TopEntries"]

ENTRY_SCOPES = (*SCOPES, "per_row")
_PROBED = (*STATISTICS, *INPUT_STATISTICS)
_FREE = ("random", "magnitude", "low_rank_magnitude")  # scores that need no probe


@dataclass(frozen=True, kw_only=True)
class TopEntries:
    """The entries with the highest `score`, as many as the budget buys within each `scope`.

    score: a statistic of the probe (`abs_grad`, `accumulated_grad` = `signed_grad`, `squared_grad`,
    `weight_times_grad`; of linear layers alone `input_norm`, the norm of its input column over all tokens, and
    `weight_times_input`, |w| times that),
    `magnitude` |w|, `low_rank_magnitude` (|w| of the best approximation of rank `rank`), or `random`. order:
    `highest`, or `lowest` for the smallest scores. scope: `global`; `per_kind` (attention, MLP, others), `per_layer`
    (those outside the layers together) or `per_matrix`, each its share by the size of its candidates; `per_row`:
    `per_row` entries of each output (the same number everywhere; by default what the budget buys). share: of the model,
    where there is no budget.
    """

    score: str = "abs_grad"
    scope: str = "global"
    target_modules: str | Sequence[str] = "all-linear"
    layers: Layers = None
    per_row: int | None = None
    rank: int = 64
    share: float = 0.01
    order: str = "highest"

    def __post_init__(self) -> None:
        if self.score not in (*_PROBED, *_FREE):
            raise ThriftyError(unknown("score", str(self.score), [*_PROBED, *_FREE]))
        if self.scope not in ENTRY_SCOPES:
            raise ThriftyError(unknown("scope", str(self.scope), ENTRY_SCOPES))
        check_order(self.order)
        for key, value in (("per_row", self.per_row), ("rank", self.rank)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ThriftyError(f"{key} {value!r} is not valid: give a number of 1 or more")
        if self.per_row is not None and self.scope != "per_row":
            raise ThriftyError(f"per_row is for scope 'per_row', not {self.scope!r}: remove one of them")

    spends: ClassVar[bool] = True

    @property
    def statistics(self) -> frozenset[str]:
        return frozenset() if self.score in _FREE else frozenset({self.score})

    def _targets(self, model: nn.Module) -> dict[str, Target]:
        return dict(targets(model, self.target_modules, layers=self.layers))

    def grids(self, model: nn.Module, budget: Budget | None) -> Mapping[str, tuple[int, int]]:
        return dict.fromkeys(self._targets(model), (1, 1))

    def check(self, model: nn.Module, budget: Budget | None) -> None:
        """ThriftyError where no target matches, or the budget buys less than one entry of each row."""
        found, limit = self._targets(model), (budget or Budget(fraction=self.share)).numbers(model)
        if self.score in INPUT_STATISTICS:
            check_inputs(model, found)
        if self.scope == "per_row":
            rows = sum(_rows(target) for target in found.values())
            if self._per_row(found, limit) < 1 or (self.per_row and budget and self.per_row * rows > 1.05 * limit):
                given = budget or Budget(fraction=self.share)
                raise ThriftyError(
                    f"budget {given} ({limit:,} numbers) does not buy {self.per_row or 1} entries for each of "
                    f"{rows:,} rows: raise budget to at least {(self.per_row or 1) * rows}"
                )
            narrow = next((t for t in found.values() if t.out_in[1] < (self.per_row or 1)), None)
            if narrow is not None:
                raise ThriftyError(
                    f"per_row {self.per_row} is more than the {narrow.out_in[1]} inputs of {narrow.name}: lower per_row"
                )
        elif limit < 1:
            raise ThriftyError(f"budget {budget} buys no entry: raise budget")

    def _per_row(self, found: Mapping[str, Target], limit: int) -> int:
        return self.per_row or limit // sum(_rows(target) for target in found.values())

    def select(self, model: nn.Module, *, probe: Probe | None, budget: Budget | None, seed: int) -> Plan:
        """The plan: never more than the budget; ties go to the earlier entry."""
        self.check(model, budget)
        found, limit = self._targets(model), (budget or Budget(fraction=self.share)).numbers(model)
        sign = -1 if self.order == "lowest" else 1
        scores = ((name, sign * score) for name, score in self._scores(model, found, probe, seed))
        regions: dict[str, Region] = {}
        if self.scope == "per_row":
            count = self._per_row(found, limit)
            for name, score in scores:
                regions[name] = Entries(_best_per_row(score, count, transposed=found[name].transposed))
            return Plan.of(model, regions)
        groups = [group_of(name, self.scope) for name in found]
        names = list(dict.fromkeys(groups))
        sizes = [sum(_size(t) for t, g in zip(found.values(), groups, strict=True) if g == n) for n in names]
        best = {
            n: BestEntries(share) for n, share in zip(names, shares(sizes, sizes, min(limit, sum(sizes))), strict=True)
        }
        for name, score in scores:
            best[group_of(name, self.scope)].add(name, score.flatten())
        for kept in best.values():
            regions |= kept.regions()
        if not regions:
            raise ThriftyError(
                f"budget {budget}, split by scope {self.scope!r}, buys no entry: raise budget, or use scope 'global'"
            )
        return Plan.of(model, regions)

    def _scores(
        self, model: nn.Module, found: Mapping[str, Target], probe: Probe | None, seed: int
    ) -> Iterator[tuple[str, Tensor]]:
        """One matrix after the other, float32 on the CPU, shaped as it is stored."""
        parameters, generator = dict(model.named_parameters()), torch.Generator().manual_seed(seed)
        for name in found:
            weight = parameters[name].detach()
            if self.score in ("magnitude", "low_rank_magnitude") and not bool(torch.isfinite(weight).all()):
                raise ThriftyError(
                    f"{name} holds numbers that are not finite: load a sound checkpoint, or another dtype"
                )
            if self.score == "random":
                yield name, torch.rand(weight.shape, generator=generator)
            elif self.score == "magnitude":
                yield name, weight.float().abs().cpu()
            elif self.score == "low_rank_magnitude":
                yield name, _low_rank(weight.float(), self.rank, seed=seed).abs().cpu()
            elif self.score in INPUT_STATISTICS:
                assert probe is not None
                yield name, probe.of_inputs(self.score, found[name], weight, grid=ENTRY_GRID).float().cpu()
            else:
                assert probe is not None
                ones = torch.ones((), device=weight.device)
                yield name, probe.mean(self.score, name, sizes=ones).float().cpu()


def _size(target: Target) -> int:
    return torch.Size(target.shape).numel()


def _rows(target: Target) -> int:
    """Output channels, of all experts."""
    return _size(target) // target.out_in[1]


def _best_per_row(score: Tensor, count: int, *, transposed: bool) -> Tensor:
    """Flat positions of the `count` best of each output; ties: the earlier input."""
    rows = score.mT if transposed else score
    # sorted: topk leaves open which of two equal numbers it takes
    top = torch.argsort(rows, dim=-1, descending=True, stable=True)[..., :count].clone()
    if transposed:
        return (top * score.shape[-1] + torch.arange(len(rows))[:, None]).flatten()
    return (top.flatten(0, -2) + torch.arange(rows[..., 0].numel())[:, None] * rows.shape[-1]).flatten()


class BestEntries:
    """The best `limit` entries of tensors that come one after the other."""

    def __init__(self, limit: int) -> None:
        self.limit, self.names = limit, list[str]()
        self.score, self.owner, self.index = torch.empty(0), torch.empty(0, dtype=torch.int32), torch.empty(0).long()

    def add(self, name: str, score: Tensor) -> None:
        if not self.limit:
            return
        index = torch.argsort(score, descending=True, stable=True)[: self.limit]
        owner = torch.full((len(index),), len(self.names), dtype=torch.int32)
        self.names.append(name)
        scores = torch.cat([self.score, score[index]])
        keep = torch.argsort(scores, descending=True, stable=True)[: self.limit]
        self.score = scores[keep]
        self.owner = torch.cat([self.owner, owner])[keep]
        self.index = torch.cat([self.index, index])[keep]

    def regions(self) -> dict[str, Region]:
        found = {name: self.index[self.owner == i] for i, name in enumerate(self.names)}
        return {name: Entries(index) for name, index in found.items() if len(index)}


def _low_rank(weight: Tensor, rank: int, *, seed: int) -> Tensor:
    """The approximation of rank `rank`, by randomized SVD (Halko et al. 2011), of each matrix `[..., out, in]`."""
    if rank >= min(weight.shape[-2:]):
        return weight
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(weight, q=min(rank + 8, *weight.shape[-2:]), niter=2)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank].mT
