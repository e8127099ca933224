"""Rows by attribution: in every layer the outputs of the MLP that matter least for what the model already knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.budget import Budget, share_of
from ..core.errors import ThriftyError
from ..core.plan import Plan, kind_of
from ..core.region import Blocks, Region
from .layers import Layers
from .probe import Probe
from .targets import Target, targets

__all__ = ["LowestAttributed", "mlp_outputs"]


def mlp_outputs(model: nn.Module, *, layers: Layers = None) -> dict[str, Target]:
    """The matrices that write an MLP's output: in each module of the MLP the last one whose outputs are as many as the
    embedding is wide. ThriftyError where there is none."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    wide = None if embedding is None else next(embedding.parameters()).shape[-1]
    found = {
        target.name.removesuffix(".weight").rpartition(".")[0]: target  # the last of a module wins
        for target in targets(model, "all-linear", layers=layers).values()
        if kind_of(target.name) == "mlp" and target.out_in[0] == wide
    }
    if not found:
        raise ThriftyError(
            f"no matrix of {type(model).__name__} is seen to write an MLP's output: name them with target_modules"
        )
    return {target.name: target for target in found.values()}


@dataclass(frozen=True, kw_only=True)
class LowestAttributed:
    """The same share of whole rows (outputs) of every matrix: those that are most often among the least attributed.

    quota: the share (0.1, "10%") of the rows of each matrix; None: what the budget buys. target_modules: None for what
    `mlp_outputs` finds. joint: all matrices on one path, see `attribution.attribute`. Of stacked experts, which write
    one output, the same rows are taken in each. Ties: the lower mean attribution, then the earlier row.
    """

    quota: float | str | None = None
    target_modules: str | Sequence[str] | None = None
    layers: Layers = None
    joint: bool = False

    def __post_init__(self) -> None:
        if self.quota is not None:
            share_of(self.quota, key="quota")

    @property
    def spends(self) -> bool:
        return self.quota is None

    @property
    def statistics(self) -> frozenset[str]:
        return frozenset({"joint_attribution" if self.joint else "attribution"})

    def _targets(self, model: nn.Module) -> dict[str, Target]:
        if self.target_modules is None:
            return mlp_outputs(model, layers=self.layers)
        return dict(targets(model, self.target_modules, layers=self.layers))

    def grids(self, model: nn.Module, budget: Budget | None) -> Mapping[str, tuple[int, int]]:
        return {name: _row(target) for name, target in self._targets(model).items()}

    def _counts(self, model: nn.Module, budget: Budget | None) -> dict[str, int]:
        """By parameter, how many rows."""
        found = self._targets(model)
        whole = sum(torch.Size(target.shape).numel() for target in found.values())
        limit = None if budget is None and self.quota is not None else (budget or Budget(fraction=0.01)).numbers(model)
        share = (limit or 0) / whole if self.quota is None else share_of(self.quota, key="quota")
        counts = {name: int(min(share, 1) * target.out_in[0] + 1e-9) for name, target in found.items()}
        need = max(1 / target.out_in[0] for target in found.values())
        if not all(counts.values()):
            key, least = (
                ("quota", f"{100 * need:.3g}%") if self.quota is not None else ("budget", int(need * whole) + 1)
            )
            raise ThriftyError(f"{key} buys no row of each of {len(found)} matrices: raise {key} to at least {least}")
        numbers = sum(n * torch.Size(found[name].shape).numel() // found[name].out_in[0] for name, n in counts.items())
        if limit is not None and numbers > 1.05 * limit:
            raise ThriftyError(
                f"quota {self.quota} trains {numbers:,} numbers, more than budget {budget} allows ({limit:,}): "
                "lower quota, or remove it or budget"
            )
        return counts

    def check(self, model: nn.Module, budget: Budget | None) -> None:
        """ThriftyError where no matrix is found, or the quota is below one row or above the budget."""
        self._counts(model, budget)

    def select(self, model: nn.Module, *, probe: Probe | None, budget: Budget | None, seed: int) -> Plan:
        assert probe is not None
        (statistic,) = self.statistics
        found, regions = self._targets(model), dict[str, Region]()
        for name, count in self._counts(model, budget).items():
            values = probe.attributions[statistic][name]
            if not bool(torch.isfinite(values).all()):
                raise ThriftyError(
                    f"the attribution of {name} is not finite: the model overflows on this text; try dtype float32, "
                    "or look for broken rows"
                )
            regions[name] = _rows(found[name], _most_often_lowest(values, count))
        return Plan.of(model, regions)


def _most_often_lowest(values: Tensor, count: int) -> Tensor:
    """Of `[rows, outputs]` the `count` outputs that are most often among the `count` lowest of a row."""
    lowest = values.argsort(dim=1, stable=True)[:, :count]
    often = torch.bincount(lowest.flatten(), minlength=values.shape[1])
    by_mean = values.mean(0).argsort(stable=True)
    return by_mean[often[by_mean].argsort(descending=True, stable=True)][:count]


def _row(target: Target) -> tuple[int, int]:
    """The stored shape of one output's weights."""
    columns = target.out_in[1]
    return (columns, 1) if target.transposed else (1, columns)


def _rows(target: Target, rows: Tensor) -> Blocks:
    zero = torch.zeros_like(rows)
    index = torch.stack([zero, rows] if target.transposed else [rows, zero], 1)
    if len(target.shape) == 3:
        experts = torch.arange(target.shape[0]).repeat_interleave(len(rows))
        index = torch.cat([experts[:, None], index.repeat(target.shape[0], 1)], 1)
    return Blocks(_row(target), index)
