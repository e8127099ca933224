"""A linear layer trained in place: forward is exactly the layer's own; backward computes the region's gradient only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ..core.entries import Entries
from ..core.region import Blocks
from ..kernels.region_grad import region_grad
from .part import InPlaceModule, Part
from .strips import Member, take, take_plain

__all__ = ["InPlaceConv1D", "InPlaceLinear", "LinearPart"]


def _conv1d(x: Tensor, weight_IO: Tensor, bias: Tensor | None) -> Tensor:
    """What `Conv1D.forward` computes; it always has a bias."""
    assert bias is not None
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight_IO).view(*x.shape[:-1], weight_IO.shape[1])


class _InPlace(torch.autograd.Function):
    """y = x W^T + b; dx = dy W only if asked for; d offset = the blocks of dy^T x. Shapes: x [..., I], W [O, I], dy
    [..., O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor, weight: Tensor, bias: Tensor | None, part: LinearPart) -> Tensor:
        y = _conv1d(x, weight, bias) if part.member.transposed else F.linear(x, weight, bias)
        compiling = torch.compiler.is_compiling()
        if compiling:
            strip = take_plain(x, part.member.strips, dtype=y.dtype)
        else:
            strip = take(x, part.member, dtype=y.dtype)
        ctx.save_for_backward(strip)
        # not saved for backward: rewriting the same values into W would raise "modified by an inplace operation"
        ctx.weight, ctx.layout = weight, part.member.layout
        ctx.part, ctx.stamp = (None, 0) if compiling else (part, part.stamp)
        ctx.x_dtype = x.dtype
        ctx.leaf_shape, ctx.leaf_dtype = leaf.shape, leaf.dtype
        ctx.transposed = part.member.transposed
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.part is not None and ctx.part.stamp != ctx.stamp:
            raise RuntimeError(
                f"the trained values of {ctx.part.name} changed between this forward and its backward: "
                "call backward before the optimizer's step, or run the forward again"
            )
        dx = d_leaf = d_bias = None
        if ctx.needs_input_grad[0]:
            weight_OI = ctx.weight.t() if ctx.transposed else ctx.weight
            dx = (dy @ weight_OI.to(dy.dtype)).to(ctx.x_dtype)
        dy_TO = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[1]:
            (strip_TU,) = ctx.saved_tensors
            left, right = (strip_TU, dy_TO) if ctx.transposed else (dy_TO, strip_TU)
            d_leaf = region_grad(left, right, ctx.layout, dtype=ctx.leaf_dtype).view(ctx.leaf_shape)
        if ctx.needs_input_grad[3]:
            d_bias = dy_TO.sum(0)
        return dx, d_leaf, None, d_bias, None


class LinearPart(Part):
    """Blocks or entries of a linear layer's weight: their gradient comes from the layer's input and output gradient,
    never dense."""

    def __init__(self, module: nn.Module, *, name: str, region: Blocks | Entries) -> None:
        transposed = isinstance(module, Conv1D)
        assert isinstance(module.weight, Tensor)
        self.member = Member(region, module.weight.shape, transposed=transposed)
        super().__init__(module, "weight", name=name, region=region)

    def arm(self) -> None:
        super().arm()
        self.member.enlist()


class _InPlaceLayer(InPlaceModule):
    """Stands before the layer's own class: forward is that class's own, unless a gradient is wanted."""

    def forward(self, x: Tensor) -> Tensor:
        part = self._thrifty["weight"]
        assert isinstance(part, LinearPart)
        if not torch.compiler.is_compiling() and part.dirty:  # in this order: compiled code must not depend on the flag
            part.flush()
        if not torch.is_grad_enabled() or not part.leaf.requires_grad:
            return super().forward(x)
        return _InPlace.apply(x, part.leaf, self.weight, self.bias, part)


class InPlaceLinear(_InPlaceLayer, nn.Linear):
    """`nn.Linear` with blocks of its weight trained in place."""


class InPlaceConv1D(_InPlaceLayer, Conv1D):
    """GPT-2's `Conv1D` (weight `[in, out]`) with blocks of its weight trained in place."""
