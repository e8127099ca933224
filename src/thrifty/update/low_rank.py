"""A low-rank pair beside a frozen matrix: y = W x + b + (alpha / r) B A x."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.low_rank import LowRank as LowRankRegion
from ..core.method import Selector
from ..delta import LowRankPiece
from ..kernels.low_rank import add_product
from ..select.pairs import Pairs
from .part import LEAF_PREFIX, InPlaceModule, Part, leaf_dtype
from .sharded import copy_whole, whole

__all__ = ["LowRank", "LowRankConv1D", "LowRankLinear", "LowRankPart"]


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Train, for each matrix that is chosen whole, a pair A `[r, in]` and B `[out, r]`, added while it trains and
    written into the weights at the end. Costs one narrow product more in each forward; inference is free after
    `finish`."""

    r: int = 8
    alpha: float = 16.0
    kind: str = "low_rank"

    def selector(self, select: Selector) -> Selector:
        return Pairs(of=select, r=self.r, alpha=self.alpha)


class LowRankPart(Part):
    """The pair of one linear layer's weight, in one leaf `[r, in + out]`: A beside B transposed.

    A starts random, uniform in +-1 / sqrt(in) as in LoRA's own code, B zero: the model starts as it is. `W` holds the
    base until `finish`.
    """

    region: LowRankRegion

    def __init__(self, module: nn.Module, *, name: str, region: LowRankRegion, generator: torch.Generator) -> None:
        self.module, self.attribute, self.name, self.region = module, "weight", name, region
        self.in_leaf, self.dirty, self.stamp = False, False, 0
        self.kept: Tensor | None = None  # not None while the base is asked for
        self.transposed = isinstance(module, Conv1D)
        weight = self.weight
        outputs, self.inputs = weight.shape[::-1] if self.transposed else weight.shape
        width = 1 / math.sqrt(self.inputs)
        values = torch.zeros(region.r, self.inputs + outputs, dtype=leaf_dtype(weight.dtype))
        values[:, : self.inputs].uniform_(-width, width, generator=generator)
        module.register_parameter(LEAF_PREFIX + self.attribute, nn.Parameter(values.to(weight.device)))

    @property
    def original(self) -> Tensor:  # type: ignore[override]
        """The base, which is never written while it trains."""
        return whole(self.weight.detach())

    def branch(self, x: Tensor) -> Tensor:
        """(alpha / r) B A x, in the dtype of `x` or of the autocast around it; x `[..., in]` -> `[..., out]`."""
        leaf = self.leaf.to(x.dtype)
        narrow = F.linear(x, leaf[:, : self.inputs])
        return F.linear(narrow * self.region.scale, leaf[:, self.inputs :].t())

    def _stored(self) -> tuple[Tensor, Tensor]:
        """The factors whose product has the shape in which the weight is stored."""
        a, b = whole(self.leaf.detach()).split([self.inputs, self.leaf.shape[1] - self.inputs], dim=1)
        return (a.t(), b) if self.transposed else (b.t(), a)

    def moved(self) -> bool:
        """Has B left zero?"""
        return bool(whole(self.leaf.detach())[:, self.inputs :].any())

    def arm(self) -> None:
        """Nothing is written after a step."""

    def disarm(self) -> None:
        """As `arm`."""

    def write(self) -> None:
        """`W` stays the base."""

    def finish(self) -> None:
        copy_whole(add_product(whole(self.weight.detach()), *self._stored(), scale=self.region.scale), self.weight.data)

    def piece(self, original: Tensor) -> LowRankPiece:
        return LowRankPiece.of(original, *self._stored(), region=self.region)

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Nothing is kept beside the module's parameters."""

    def swap_in(self, values: Tensor) -> None:
        """Leave the pair out until `swap_out`."""
        self.kept = values

    def swap_out(self) -> None:
        self.kept = None

    def adopt_weight(self) -> None:
        """Another base was loaded under the pair."""


class _LowRankLayer(InPlaceModule):
    """Stands before the layer's own class: forward is that class's own, and the pair's."""

    def forward(self, x: Tensor) -> Tensor:
        part = self._thrifty["weight"]
        assert isinstance(part, LowRankPart)
        y: Tensor = super().forward(x)
        return y if part.kept is not None else y + part.branch(x)


class LowRankLinear(_LowRankLayer, nn.Linear):
    """`nn.Linear` with a low-rank pair."""


class LowRankConv1D(_LowRankLayer, Conv1D):
    """GPT-2's `Conv1D` (weight `[in, out]`) with a low-rank pair."""
