"""A matrix trained inside two fixed subspaces: y = W x + b + left R right x, R alone is trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.low_rank import LowRank
from ..core.projected import Projected
from ..delta import LowRankPiece
from ..kernels.low_rank import add_product
from .low_rank import LowRankPart
from .part import LEAF_PREFIX, leaf_dtype
from .sharded import copy_whole, whole

__all__ = ["ProjectedPart"]


class ProjectedPart(LowRankPart):
    """The core R `[m, n]` of one linear layer's weight is the leaf, and starts at zero. `W` holds the base until
    `finish`. Backward keeps the `n` projected inputs, not the inputs; forward and backward cost two narrow products
    each."""

    region: Projected  # type: ignore[assignment]

    def __init__(self, module: nn.Module, *, name: str, region: Projected) -> None:
        self.module, self.attribute, self.name, self.region = module, "weight", name, region
        self.in_leaf, self.dirty, self.stamp = False, False, 0
        self.kept: Tensor | None = None
        self.transposed = isinstance(module, Conv1D)
        weight = self.weight
        dtype = leaf_dtype(weight.dtype)
        self.left, self.right = (side.to(weight.device, dtype) for side in (region.left, region.right))
        core = torch.zeros(region.core, dtype=dtype, device=weight.device)
        module.register_parameter(LEAF_PREFIX + self.attribute, nn.Parameter(core))

    def branch(self, x: Tensor) -> Tensor:
        """left R right x (of a weight stored `[in, out]`: x left R right), in the dtype of `x` or of the autocast."""
        left, core, right = (t.to(x.dtype) for t in (self.left, self.leaf, self.right))
        if self.transposed:
            return F.linear(F.linear(F.linear(x, left.t()), core.t()), right.t())
        return F.linear(F.linear(F.linear(x, right), core), left)

    def _stored(self) -> tuple[Tensor, Tensor]:
        """`left` and R right, or left R and `right`: whichever has the lower rank."""
        core = whole(self.leaf.detach())
        with torch.autocast(core.device.type, enabled=False):
            return (self.left, core @ self.right) if core.shape[0] <= core.shape[1] else (self.left @ core, self.right)

    def _pair(self) -> LowRank:
        r = min(self.region.core)
        return LowRank(r, float(r))

    def moved(self) -> bool:
        return bool(whole(self.leaf.detach()).any())

    def finish(self) -> None:
        copy_whole(add_product(whole(self.weight.detach()), *self._stored(), scale=1.0), self.weight.data)

    def piece(self, original: Tensor) -> LowRankPiece:
        return LowRankPiece.of(original, *self._stored(), region=self._pair())

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """The subspaces go where the weight goes, and stay as wide as the leaf."""
        self.left, self.right = (side.to(fn(side).device) for side in (self.left, self.right))
