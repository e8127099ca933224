"""The additive form: y += x P^T beside a frozen linear layer, where P is zero outside a region's blocks.

The base is neither read nor written, so it may be quantized, shared or switched. Nothing of the size of the matrix is
made: forward and backward multiply block by block, and backward keeps the input columns that some block reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.region import Blocks
from ..kernels.region_grad import Layout, region_grad
from ..kernels.region_product import RegionProduct
from .strips import Member, Strips, take, take_plain

__all__ = ["Additive"]


class _Add(torch.autograd.Function):
    """z = x P^T; dx = dz P only if asked for; dP = the blocks of dz^T x. Shapes: x [..., I], z [..., O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, blocks: Additive, dtype: torch.dtype) -> Tensor:
        ways = blocks.ways()
        with torch.autocast(x.device.type, enabled=False):
            if blocks.shares and not torch.compiler.is_compiling():
                strip_TU = take(x, blocks.member, dtype=dtype)
            else:
                strip_TU = take_plain(x, ways.strips, dtype=dtype)
            z_TO = ways.forth(strip_TU, packed.to(dtype), width=blocks.outputs)
        ctx.save_for_backward(strip_TU if ctx.needs_input_grad[1] else None, packed)
        ctx.blocks, ctx.ways, ctx.x_shape, ctx.x_dtype = blocks, ways, x.shape, x.dtype
        return z_TO.view(*x.shape[:-1], blocks.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        strip_TU, packed = ctx.saved_tensors
        blocks, ways, dz_TO = ctx.blocks, ctx.ways, dz.reshape(-1, dz.shape[-1])
        dx = d_packed = None
        with torch.autocast(dz.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                columns = ways.strips.columns
                dx_TU = ways.back(dz_TO, packed.to(dz.dtype), width=len(columns))
                if len(columns) == ctx.x_shape[-1]:
                    dx = dx_TU
                else:
                    dx = dx_TU.new_zeros(len(dx_TU), ctx.x_shape[-1])
                    dx.index_copy_(1, columns.to(dx.device), dx_TU)
                dx = dx.view(ctx.x_shape).to(ctx.x_dtype)
            if ctx.needs_input_grad[1]:
                left, right = (strip_TU, dz_TO) if blocks.transposed else (dz_TO, strip_TU)
                d_packed = region_grad(left, right, ways.layout, dtype=packed.dtype).view(packed.shape)
        return dx, d_packed, None, None


@dataclass(frozen=True)
class _Ways:
    """The products of one region in terms of the strip that it takes."""

    strips: Strips
    layout: Layout
    forth: RegionProduct
    back: RegionProduct


class Additive:
    """The blocks `region` beside a weight of stored `shape`. `transposed`: stored `[in, out]`. `shares`: layers that
    read the same input keep one strip of it, as those trained in place do (`strips.py`)."""

    def __init__(self, region: Blocks, shape: Sequence[int], *, transposed: bool, shares: bool = False) -> None:
        self.member = Member(region, shape, transposed=transposed)
        self.transposed, self.shares = transposed, shares
        self.outputs = int(shape[1] if transposed else shape[0])
        self._ways: _Ways | None = None

    def ways(self) -> _Ways:
        """Made anew where the strip has become a wider one."""
        if self._ways is None or self._ways.strips is not self.member.strips:
            layout = self.member.layout
            assert isinstance(layout, Layout)
            forth = RegionProduct(layout.groups, to_rows=not self.transposed)
            back = RegionProduct(layout.groups, to_rows=self.transposed)
            self._ways = _Ways(self.member.strips, layout, forth, back)
        return self._ways

    def __call__(self, x: Tensor, packed: Tensor, *, dtype: torch.dtype) -> Tensor:
        """What the packed values `packed` (any floating dtype) add to the layer's output for `x` `[..., I]`: `[..., O]`
        in `dtype`, the output's own. Products run in `dtype`; the gradient of `packed` has its dtype."""
        out: Tensor = _Add.apply(x, packed, self, dtype)
        return out
