"""The general form: a parameter that no linear layer reads alone (tied, stacked, norms, a head read directly).

Whoever reads the attribute sees the parameter through a function that returns it unchanged and whose backward gathers
the region from the dense gradient that passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .part import InPlaceModule, Part
from .sharded import is_sharded

__all__ = ["seeing_class"]


class _See(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, weight: Tensor, part: Part) -> Tensor:
        compiling = torch.compiler.is_compiling()  # then the stamp would be a constant, compiled again at each step
        ctx.part, ctx.stamp = (None, 0) if compiling else (part, part.stamp)
        ctx.gathers = part.gathers
        ctx.leaf_dtype, ctx.leaf_shape = leaf.dtype, leaf.shape
        return weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_weight: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.part is not None and ctx.part.stamp != ctx.stamp:
            raise RuntimeError(
                f"the trained values of {ctx.part.name} changed between this forward and its backward: "
                "call backward before the optimizer's step, or run the forward again"
            )
        return ctx.gathers.gather(d_weight).to(ctx.leaf_dtype).view(ctx.leaf_shape), None, None


def _property(attribute: str) -> property:
    def get(self: InPlaceModule) -> Tensor | None:
        part, weight = self._thrifty[attribute], self._parameters[attribute]
        if not torch.compiler.is_compiling():
            part.flush()
        if weight is None or is_sharded(weight):  # FSDP2 itself looks, to put it together for forward
            return weight
        if not torch.is_grad_enabled() or not part.leaf.requires_grad:
            return weight
        return _See.apply(part.leaf, weight, part)

    return property(get, doc=f"The parameter `{attribute}`, seen through its region's gradient.")


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def seeing_class(base: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    """`base` with `attributes` seen through their parts; one class for each pair."""
    body: dict[str, Any] = {attribute: _property(attribute) for attribute in attributes}
    key = (base, attributes)
    if key not in _CLASSES:
        # a linear layer whose weight is trained in its own way stands before the layer's class already
        bases = (base,) if issubclass(base, InPlaceModule) else (InPlaceModule, base)
        _CLASSES[key] = type(f"InPlace{base.__name__}", bases, body | {"__module__": __name__})
    return _CLASSES[key]
