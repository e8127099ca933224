"""Several parts, one plan: budgets shared out, gradients looked at once, no tensor in two parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..core.budget import Budget
from ..core.errors import ThriftyError
from ..core.method import Method, Part, Selector
from ..core.plan import Plan
from ..core.region import Region
from .attribution import ATTRIBUTIONS
from .contrastive import answered_units, contrastive_loss
from .probe import Loss, Probe, model_loss, run_probe

__all__ = ["budgets", "check", "compose"]

_Chosen = tuple[Selector, Budget | None]


def budgets(method: Method, model: nn.Module, limit: Budget | None) -> list[_Chosen]:
    """Each part's selector with its budget: its own, or an equal share of what the other parts leave of `limit`."""
    parts = [(part, part.update.selector(part.select)) for part in method.parts if part.select is not None]
    if limit is None or len(parts) == 1:
        return [(select, part.budget or limit) for part, select in parts]
    fixed = sum(_size(part, select, model) for part, select in parts if part.budget or not select.spends)
    sharing = sum(select.spends and part.budget is None for part, select in parts)
    left = limit.numbers(model) - fixed
    if left < 2 * sharing or left < 0:
        raise ThriftyError(
            f"budget {limit} ({limit.numbers(model):,} numbers) is too small: the parts of fixed size "
            f"hold {fixed:,}; raise budget to at least {fixed + 2 * sharing}, or lower the budgets of the parts"
        )
    share = Budget(count=left // sharing) if sharing else None
    return [(select, part.budget or (share if select.spends else None)) for part, select in parts]


def _size(part: Part, select: Selector, model: nn.Module) -> int:
    if part.budget is not None:
        return part.budget.numbers(model)
    return select.select(model, probe=None, budget=None, seed=0).trainable_parameters


def check(method: Method, model: nn.Module, limit: Budget | None) -> None:
    """ThriftyError for what is wrong with the method on this model, before any gradient is taken."""
    for select, budget in budgets(method, model, limit):
        select.check(model, budget)


def compose(
    method: Method,
    model: nn.Module,
    limit: Budget | None,
    *,
    batches: Iterable[Mapping[str, Any]] | None,
    seed: int,
    loss: Loss = model_loss,
    rows: int = 4,
) -> tuple[Plan, float]:
    """The plan of all parts, and the seconds that looking at gradients took."""
    check(method, model, limit)
    if method.loss == "contrastive" and batches is not None:
        loss, batches = contrastive_loss, answered_units(batches, rows=rows)
    chosen = budgets(method, model, limit)
    probes, seconds = _probes(method, model, chosen, batches=batches, loss=loss, rows=rows)
    plans = [
        select.select(model, probe=probe, budget=budget, seed=seed)
        for (select, budget), probe in zip(chosen, probes, strict=True)
    ]
    if len(plans) == 1:
        return plans[0], seconds
    regions: dict[str, Region] = {}
    owner: dict[str, int] = {}
    for number, plan in enumerate(plans, 1):
        for name, region in plan.items():
            if name in owner:
                raise ThriftyError(
                    f"parts {owner[name]} and {number} of method {method.name!r} both train {name}: "
                    "give them different target_modules or layers"
                )
            owner[name], regions[name] = number, region
    return Plan.of(model, regions), seconds


def _probes(
    method: Method,
    model: nn.Module,
    chosen: Sequence[_Chosen],
    *,
    batches: Iterable[Mapping[str, Any]] | None,
    loss: Loss,
    rows: int,
) -> tuple[list[Probe | None], float]:
    """A probe for each part that asks for one: the same pass, unless two parts cut one matrix in different ways.
    Attributions take a pass of their own."""
    asking = [(i, select, budget) for i, (select, budget) in enumerate(chosen) if select.statistics]
    probes: list[Probe | None] = [None] * len(chosen)
    if not asking:
        return probes, 0.0
    if batches is None:
        what = "of general text " if method.general else ""
        raise ThriftyError(
            f"method {method.name!r} looks at gradients first: pass batches=[...] {what}"
            "(dicts with input_ids, attention_mask, labels)"
        )
    passes: list[tuple[dict[str, tuple[int, int]], set[str], list[int]]] = []
    for i, select, budget in asking:
        grids = dict(select.grids(model, budget))
        for together, statistics, members in passes:
            alike = statistics == select.statistics or not (statistics | select.statistics) & set(ATTRIBUTIONS)
            if alike and all(together.get(name, grid) == grid for name, grid in grids.items()):
                together |= grids
                statistics |= select.statistics
                members.append(i)
                break
        else:
            passes.append((grids, set(select.statistics), [i]))
    kept = list(batches) if len(passes) > 1 else batches
    seconds = 0.0
    for grids, statistics, members in passes:
        probe = run_probe(model, kept, grids=grids, statistics=statistics, loss=loss, rows=rows)
        seconds += probe.seconds
        for i in members:
            probes[i] = probe
    return probes, seconds
