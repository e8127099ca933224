"""Quantized weights: tensors of torchao, the product with one, its gradient, and the linear layer around both.

A weight that torchao quantized is a tensor of a class of its own, with the shape and the dtype of what it stands for.
Its kernels differ: some have no gradient (`_weight_int4pack_mm_for_cpu`), others keep a dequantized copy of each weight
for backward. Here forward is the kernel, and backward makes the values again, one matrix at a time. `Int4Tensor` has
no kernel but on some GPUs: its values are made in forward too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["QuantizedLinear", "dequantized", "give_gradients", "is_quantized", "quantized_as", "stored_bytes"]

_ROWS = 1024  # of the identity, where a kernel itself has to say what it multiplies by


def is_quantized(tensor: Tensor) -> bool:
    """Is this a tensor of torchao?"""
    return any(kind.__module__.partition(".")[0] == "torchao" for kind in type(tensor).__mro__)


def _is_int4(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "Int4Tensor"


def _unpacked(tensor: Any) -> Tensor:
    """The values of torchao's `Int4Tensor`: two codes of -8 to 7 in a byte, the first in its low half; times the scale,
    plus the zero, of their group of inputs `[groups, out]`."""
    pairs = tensor.qdata.view(torch.uint8)
    codes = (torch.stack([pairs & 15, pairs >> 4], dim=-1).view(torch.int8) ^ 8) - 8
    scale, zero = tensor.scale.t(), tensor.zero_point.t()
    groups = codes.view(*scale.shape, -1).to(scale.dtype)
    return groups.mul_(scale[:, :, None]).add_(zero[:, :, None]).view(tensor.shape)


@torch.no_grad()
def dequantized(tensor: Tensor) -> Tensor:
    """The matrix `[out, in]` that a quantized `tensor` stands for, in its dtype; any other tensor as it is."""
    tensor = tensor.detach()
    if not is_quantized(tensor):
        return tensor
    values: Tensor
    if _is_int4(tensor):
        values = _unpacked(tensor)
    elif hasattr(tensor, "get_original_weight"):  # NF4
        values = tensor.get_original_weight()
    elif type(tensor).dequantize is not Tensor.dequantize:
        values = tensor.dequantize()
    else:  # packed for a kernel: its product with the identity
        rows, columns = tensor.shape
        values = torch.empty(rows, columns, dtype=tensor.dtype, device=tensor.device)
        for start in range(0, columns, _ROWS):
            wide = min(_ROWS, columns - start)
            few = torch.zeros(wide, columns, dtype=tensor.dtype, device=tensor.device)
            few[:, start : start + wide].fill_diagonal_(1)
            values[:, start : start + wide] = F.linear(few, tensor).t()
    return values.to(tensor.dtype)


def stored_bytes(tensor: Tensor) -> int:
    """What a tensor holds in memory; of a quantized one what it is packed in, with its scales."""
    if not is_quantized(tensor):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(stored_bytes(getattr(tensor, name)) for name in names)


class _Product(torch.autograd.Function):
    """y = x W^T + b; dx = dy W; dW = dy^T x, dense, only where it is asked for. Shapes: x [..., I], W [O, I], y [...,
    O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            held = dequantized(weight).to(x.dtype) if _is_int4(weight) else weight.detach()
            y = F.linear(x, held, None if bias is None else bias.detach().to(x.dtype))
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        ctx.weight = weight  # frozen, so that it need not be among what is saved
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dx = d_weight = d_bias = None
        dy_TO = dy.reshape(-1, dy.shape[-1])
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = dy @ dequantized(ctx.weight).to(dy.dtype)
            if ctx.needs_input_grad[1]:
                d_weight = (dy_TO.t() @ x.reshape(-1, x.shape[-1])).to(ctx.weight.dtype)
            if ctx.needs_input_grad[2]:
                d_bias = dy_TO.sum(0)
        return dx, d_weight, d_bias


class QuantizedLinear(nn.Linear):
    """`nn.Linear` whose weight torchao quantized, and through which gradients pass whatever the kernel.

    base_sha256: the fingerprint of the weight before it was quantized, where that is known. form: as a run file names
    the quantization, where it is one of those.
    """

    base_sha256: str | None = None
    form: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        y: Tensor = _Product.apply(x, self.weight, self.bias)
        return y


def give_gradients(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Make every linear layer with a quantized weight a `QuantizedLinear`, in place; parameter name -> layer."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_quantized(module.weight):
            if type(module) is nn.Linear:
                module.__class__ = QuantizedLinear
            if isinstance(module, QuantizedLinear):
                found[f"{name}.weight" if name else "weight"] = module
    return found


def quantized_as(model: nn.Module) -> str | None:
    """How the weights of `model` are quantized: `int8`, `int4`, `nf4`, or torchao's class; None where none is."""
    found = {
        getattr(module, "form", None) or type(module.weight).__name__
        for module in model.modules()
        if isinstance(module, nn.Linear) and is_quantized(module.weight)
    }
    return ", ".join(sorted(found)) or None
