"""A random half of every layer's matrices and norms."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..core.budget import Budget
from ..core.plan import Plan, kind_of
from ..core.region import Whole
from .fixed import FixedSize
from .layers import layer_of

__all__ = ["Halves"]


@dataclass(frozen=True, kw_only=True)
class Halves(FixedSize):
    """In every layer a random half of the modules of each category: attention matrices, MLP matrices, norms; and every
    tensor outside the layers. A bias goes with its module. Where a category holds an odd number, half of the layers,
    drawn at random, take the larger part. A budget beside it is only checked."""

    def select(self, model: nn.Module, *, probe: object, budget: Budget | None, seed: int) -> Plan:
        parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point() and p.numel()}
        draw, chosen = random.Random(seed), set[str]()
        groups = _categories(parameters)
        for category in dict.fromkeys(category for category, _ in groups):
            layers = [layer for other, layer in groups if other == category]
            larger = set(draw.sample(layers, k=(len(layers) + 1) // 2))
            for layer in layers:
                units = groups[category, layer]
                chosen |= set(draw.sample(units, k=(len(units) + (layer in larger)) // 2))
        return Plan.of(model, {name: Whole() for name in parameters if layer_of(name) is None or _unit(name) in chosen})


def _unit(name: str) -> str:
    """What a parameter is trained with: a bias with its module's weight."""
    owner, _, key = name.rpartition(".")
    return owner if key in ("weight", "bias") else name


def _categories(parameters: Mapping[str, nn.Parameter]) -> dict[tuple[str, int], list[str]]:
    """(category, layer) -> units, in the model's order."""
    matrices = {_unit(name) for name, p in parameters.items() if p.ndim > 1}
    groups: dict[tuple[str, int], list[str]] = {}
    for unit in dict.fromkeys(_unit(name) for name in parameters):
        layer = layer_of(unit)
        if layer is not None:
            category = kind_of(unit) if unit in matrices else "norms"
            groups.setdefault((category, layer), []).append(unit)
    return groups
