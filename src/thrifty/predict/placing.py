"""Where a method would train, before any gradient was looked at, and its parts put in place on a model without values.

What scores would decide is drawn: blocks and entries lie in every candidate matrix, each its share of the budget by
size. Scores that crowd them into few matrices (scope `global`) make a run cheaper than estimated: backward may end
earlier. Inside a matrix gradients favour some inputs, because all outputs see the same: scores are drawn so that
blocks crowd into columns as they were seen to (`CROWDING`, docs/estimate.md).
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.errors import ThriftyError
from ..core.method import Method
from ..core.plan import Plan
from ..core.projected import Projected
from ..core.region import Region
from ..select.attributed import LowestAttributed
from ..select.axes import GradientAxes
from ..select.blocks import TopBlocks
from ..select.compose import budgets
from ..select.entries import TopEntries
from ..select.probe import INPUT_STATISTICS, STATISTICS, Probe
from ..update.early_stop import allow_early_stop
from ..update.peer import PeftAdapter
from ..update.place import place

__all__ = ["DrawnProbe", "attach", "draw", "probed"]

_MOST_ENTRIES = 50_000_000  # single numbers whose places are drawn one by one
CROWDING = 1.6  # standard deviation of the logarithm of an input block's factor, beside 1 of a single block's
_KEEP_SHARE = 0.1  # as in `update/tuning.py`: originals of whole float32 tensors are kept below it


def attach(model: PreTrainedModel, method: Method, budget: Any) -> tuple[nn.Module, Plan | None]:
    """Put the method on `model` (meta device, changed). Returns what trains and the plan; None for a PEFT method, which
    places its own parts. ThriftyError as a run would give it, and for what cannot be told without gradients."""
    if method.parts[0].select is None:
        return _attach_peer(model, method), None
    plan = draw(model, method, budget)
    place(model, plan, keep_originals=plan.trainable_share < _KEEP_SHARE)
    allow_early_stop(model)
    return model, plan


def _attach_peer(model: PreTrainedModel, method: Method) -> nn.Module:
    from peft import get_peft_model  # an extra

    adapter = method.parts[0].update
    assert isinstance(adapter, PeftAdapter)
    try:
        with torch.random.fork_rng(devices=[]):
            wrapped: nn.Module = get_peft_model(model, adapter.build(), autocast_adapter_dtype=True)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise ThriftyError(
            f"PEFT's {adapter.peft_type} cannot be placed on a model without values, so it cannot be estimated: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    return wrapped


class DrawnProbe(Probe):
    """Scores that no gradient decided, the same for the same matrix: lognormal, with a factor for each input block that
    is the same for q, k and v, and for gate and up."""

    def mean(self, statistic: str, name: str, *, sizes: Tensor) -> Tensor:
        module, _, _ = name.rpartition(".")
        shared = torch.Generator().manual_seed(zlib.crc32(module.rpartition(".")[0].encode()) + sizes.shape[-1])
        alone = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        columns = torch.randn(sizes.shape[-1], generator=shared)
        return (CROWDING * columns + torch.randn(sizes.shape, generator=alone)).exp().double()


def draw(model: nn.Module, method: Method, budget: Any) -> Plan:
    """The plan, what gradients would decide drawn at random."""
    regions: dict[str, Region] = {}
    for select, limit in budgets(method, model, budget):
        if isinstance(select, GradientAxes):
            shapes = {name: p.shape for name, p in model.named_parameters()}
            regions |= {name: _axes(shapes[name], core) for name, core in select.cores(model, limit).items()}
            continue
        stand_in = _stand_in(select)
        if isinstance(stand_in, TopEntries):
            _refuse_too_many(stand_in, model, limit)
        probe = DrawnProbe() if stand_in.statistics else None
        try:
            plan = stand_in.select(model, probe=probe, budget=limit, seed=0)
        except ThriftyError:
            if not isinstance(stand_in, TopBlocks) or stand_in.scope != "per_matrix":
                raise
            # shares of single matrices are smaller than a block: the budget of all together
            plan = dataclasses.replace(stand_in, scope="global").select(model, probe=probe, budget=limit, seed=0)
        regions |= dict(plan)
    return Plan.of(model, regions)


def probed(model: nn.Module, method: Method, budget: Any) -> frozenset[str]:
    """The parameters whose gradients the method looks at before training; none where it looks at inputs alone."""
    asking = [(s, limit) for s, limit in budgets(method, model, budget) if s.statistics - {*INPUT_STATISTICS}]
    return frozenset(name for select, limit in asking for name in select.grids(model, limit))


def _axes(shape: torch.Size, core: tuple[int, int]) -> Projected:
    """Subspaces without values."""
    return Projected(
        torch.empty(shape[0], core[0], device="meta"),
        torch.empty(core[1], shape[1], device="meta"),
    )


def _stand_in(select: Any) -> Any:
    """A selector that draws what `select` would choose by values."""
    inner = getattr(select, "of", None)
    if inner is not None and dataclasses.is_dataclass(select):  # low-rank pairs, placed on what `of` chooses
        return dataclasses.replace(select, of=_stand_in(inner))  # type: ignore[type-var]
    if isinstance(select, TopBlocks):
        score = select.score if select.score in STATISTICS and select.input_budget is None else "random"
        return dataclasses.replace(select, score=score, scope="per_matrix")
    if isinstance(select, TopEntries):
        scope = "per_row" if select.scope == "per_row" else "per_matrix"
        return dataclasses.replace(select, score="random", scope=scope)
    if isinstance(select, LowestAttributed):
        modules = select.target_modules or ["down_proj"]
        return TopBlocks(
            score="random", scope="per_matrix", block_size="row", target_modules=modules, layers=select.layers
        )
    if select.statistics:
        raise ThriftyError(
            f"what {type(select).__name__} trains depends on gradients in a way that is not modelled: "
            "it cannot be estimated"
        )
    return select


def _refuse_too_many(select: TopEntries, model: nn.Module, budget: Any) -> None:
    total = sum(p.numel() for p in model.parameters())
    numbers = budget.of(total) if budget is not None else int(select.share * total)
    if numbers > _MOST_ENTRIES:
        raise ThriftyError(
            f"{numbers:,} single numbers are too many to draw for an estimate (at most {_MOST_ENTRIES:,}): "
            "lower budget, or take a method that trains blocks"
        )
