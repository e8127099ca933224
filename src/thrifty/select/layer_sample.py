"""A few layers drawn at random, with all that lies outside the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..core.budget import Budget
from ..core.errors import ThriftyError
from ..core.plan import Plan
from ..core.region import Whole
from .fixed import FixedSize
from .layers import layer_of

__all__ = ["SampledLayers"]


@dataclass(frozen=True, kw_only=True)
class SampledLayers(FixedSize):
    """`layers` layers, drawn without replacement, and every tensor outside the layers (embeddings, final norm, head).
    importance: a weight of each layer for the draw; None: all alike. A budget beside it is only checked."""

    layers: int = 2
    importance: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.layers, bool) or not isinstance(self.layers, int) or self.layers < 1:
            raise ThriftyError(f"layers {self.layers!r} is not valid: give a number of layers to draw, such as 2")
        given = self.importance
        if given is not None and (isinstance(given, str) or not all(type(w) in (int, float) and w >= 0 for w in given)):
            raise ThriftyError(f"importance {given!r} is not valid: give a number of 0 or more for each layer")

    def select(self, model: nn.Module, *, probe: object, budget: Budget | None, seed: int) -> Plan:
        parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point() and p.numel()}
        count = 1 + max((layer for name in parameters if (layer := layer_of(name)) is not None), default=-1)
        if self.layers > count:
            raise ThriftyError(f"layers {self.layers} is more than the {count} layers of the model: lower it")
        weights = torch.ones(count) if self.importance is None else torch.tensor(self.importance, dtype=torch.float32)
        if len(weights) != count or int((weights > 0).sum()) < self.layers:
            raise ThriftyError(
                f"importance must hold a number for each of the {count} layers, at least {self.layers} of them above 0"
            )
        drawn = torch.multinomial(weights, self.layers, generator=torch.Generator().manual_seed(seed)).tolist()
        return Plan.of(model, {name: Whole() for name in parameters if layer_of(name) in (None, *drawn)})
