"""What was ever trained: the delta covers it after the plan has moved on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..core.entries import union
from ..core.plan import Plan
from ..core.region import Region
from .part import Part

__all__ = ["Trained", "base_of", "ever_trained", "settled_under"]


@dataclass(frozen=True)
class Trained:
    """Numbers of one tensor and what they were before, packed, in the tensor's dtype; `original` is None for a whole
    tensor that can be read again from where the model was loaded."""

    region: Region
    original: Tensor | None


def base_of(weight: Tensor, trained: Trained) -> Tensor:
    """A copy of `weight` with the original values where it was trained."""
    assert trained.original is not None
    base = weight.detach().clone()
    trained.region.scatter_(base, trained.original)
    return base


def ever_trained(parts: Mapping[str, Part], settled: Mapping[str, Trained]) -> dict[str, Trained]:
    """By parameter name: the numbers of `parts` and those that were trained before."""
    found = dict(settled)
    for name, part in parts.items():
        here, before = Trained(part.region, part.original), settled.get(name)
        if before is None or part.original is None:
            found[name] = here
            continue
        if before.original is None:  # all of the tensor, which holds the part's numbers
            continue
        region = union(before.region, part.region, part.weight.shape)
        found[name] = Trained(region, region.gather(base_of(base_of(part.weight, before), here)))
    return found


def settled_under(plan: Plan, ever: Mapping[str, Trained]) -> dict[str, Trained]:
    """Those of `ever` that the parts of `plan` do not cover: kept on the CPU, beside the parts."""
    return {
        name: Trained(was.region, None if was.original is None else was.original.cpu())
        for name, was in ever.items()
        if name not in plan or union(plan[name], was.region, plan.shapes[name]) != plan[name]
    }
