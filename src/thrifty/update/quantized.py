"""Blocks of a quantized weight, trained in high precision beside it.

y = x Q^T + x C^T + b, where C is zero outside the blocks and, in them, the trained values minus what Q stands for
there: the blocks are taken out of the quantized weight and start from the base's original values, so that they are
trained without quantization error. Q is neither changed nor copied, and blocks need not lie along its groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..core.errors import ThriftyError
from ..core.method import Method
from ..core.quantized import QuantizedLinear, dequantized, give_gradients, is_quantized
from ..core.region import Blocks, Region
from ..delta import Piece
from ..delta.digest import fingerprint
from ..select.blocks import TopBlocks
from ..select.diagonal import Diagonal
from ..select.saved import Saved
from ..select.tensors import Tensors
from .additive import Additive
from .part import LEAF_PREFIX, InPlaceModule, Part, leaf_dtype

__all__ = [
    "Patch",
    "PatchedLinear",
    "QuantizedBlocks",
    "QuantizedPart",
    "check_method",
    "check_regions",
    "checked",
    "prepared",
]

_KNOWN = (TopBlocks, Diagonal, Saved, Tensors)
_FIX = "take smt, random_blocks, random_rows, random_columns or diablo, or leave quantize out"
_FAR = 0.5  # no quantization moves a matrix by half of its norm


class Patch(nn.Module):
    """The values of blocks in place of those of a quantized weight of `shape` `[out, in]`: all packed."""

    values: Tensor
    quantized: Tensor

    def __init__(self, region: Blocks, shape: Sequence[int], *, values: Tensor, quantized: Tensor) -> None:
        super().__init__()
        self.region = region
        self.beside = Additive(region, shape, transposed=False, shares=True)
        self.register_buffer("quantized", quantized, persistent=False)
        self.register_buffer("values", values.detach().view(quantized.shape), persistent=False)

    def change(self) -> Tensor:
        """What the blocks add to the quantized weight, float32 or wider."""
        wide = leaf_dtype(self.values.dtype)
        return self.values.to(wide) - self.quantized.to(wide)


class PatchedLinear(QuantizedLinear):
    """A quantized linear layer, some blocks of which are held in high precision."""

    patch: Patch

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.patch.beside(x, self._packed(), dtype=y.dtype)

    def _packed(self) -> Tensor:
        return self.patch.change()


class _Tap(torch.autograd.Function):
    """What the blocks add, as it was last written; its gradient is the offset's."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, change: Tensor) -> Tensor:
        return change.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_change: Tensor) -> tuple[Tensor, None]:
        return d_change, None


def checked(name: str, layer: QuantizedLinear, base: Tensor, stands_for: Tensor) -> Tensor:
    """`base`, what was quantized to `layer`'s weight, where and as what `stands_for`, the weight's values, is.
    ThriftyError where it is something else."""
    base = base.to(device=stands_for.device, dtype=stands_for.dtype)
    known = layer.base_sha256
    far = known is None and bool((base - stands_for).norm() > _FAR * base.norm())
    if far or known not in (None, fingerprint(base)):
        raise ThriftyError(
            f"{name}: the folder that the model was loaded from does not hold what was quantized: was it replaced?"
        )
    return base


class QuantizedPart(Part):
    """Blocks of a quantized weight. What in-place parts write into `W` is written into the layer's patch."""

    region: Blocks

    def __init__(self, module: QuantizedLinear, *, name: str, region: Blocks, base: Tensor) -> None:
        """`base`: the whole weight before it was quantized. ThriftyError where it is not."""
        self.module, self.attribute, self.name, self.region = module, "weight", name, region
        stands_for = dequantized(module.weight)
        base = checked(name, module, base, stands_for)
        self.fingerprint = fingerprint(base)
        self.original: Tensor = region.gather(base)
        self.in_leaf, self.dirty, self.stamp, self.kept, self.held = False, False, 0, None, None
        module.__class__ = PatchedLinear
        module.patch = Patch(region, base.shape, values=self.original, quantized=region.gather(stands_for))
        leaf = torch.zeros_like(self.original, dtype=leaf_dtype(base.dtype))
        module.register_parameter(LEAF_PREFIX + self.attribute, nn.Parameter(leaf))
        module.__class__ = QuantizedBlocks
        self.arm()

    def arm(self) -> None:
        super().arm()
        self.patch.beside.member.enlist()

    @property
    def patch(self) -> Patch:
        """What stands in place of the blocks."""
        assert isinstance(self.module, PatchedLinear)
        return self.module.patch

    def _take(self) -> Tensor:
        return self.patch.values

    def _put(self, values: Tensor) -> None:
        self.patch.values = values.detach().view(self.patch.quantized.shape)

    def piece(self, original: Tensor) -> Piece:
        self.flush()
        values = self.patch.values.cpu().clone()
        return Piece(self.region, tuple(self.weight.shape), values, original.cpu(), self.fingerprint)

    def adopt_weight(self) -> None:
        """A quantized weight was loaded: the blocks are not in it."""


class QuantizedBlocks(InPlaceModule, PatchedLinear):
    """`PatchedLinear` while its blocks are trained."""

    def _packed(self) -> Tensor:
        part = self._thrifty["weight"]
        part.flush()
        if not torch.is_grad_enabled() or not part.leaf.requires_grad:
            return self.patch.change()
        tapped: Tensor = _Tap.apply(part.leaf, self.patch.change())
        return tapped


def prepared(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers by parameter name, each with a gradient from now on. ThriftyError where blocks of one were
    trained before."""
    found = give_gradients(model)
    for name, module in found.items():
        if isinstance(module, PatchedLinear):
            raise ThriftyError(f"{name} holds blocks that were trained before: load the base again, or export the run")
    return found


def check_method(method: Method) -> None:
    """ThriftyError for a method that cannot train on a quantized base."""
    for part in method.parts:
        if part.update.kind != "in_place" or not isinstance(part.select, _KNOWN):
            raise ThriftyError(f"method {method.name!r} reads or trains more of a weight than blocks: {_FIX}")
    if method.schedule is not None:
        raise ThriftyError(
            f"method {method.name!r} changes its plan while it trains, which a quantized base does not keep up with: "
            "leave out its period (reselect_every), or quantize"
        )


def check_regions(model: nn.Module, plan: Mapping[str, Region]) -> None:
    """ThriftyError for what would be trained in a quantized weight and is no set of blocks."""
    parameters = dict(model.named_parameters())
    for name, region in plan.items():
        if is_quantized(parameters[name]) and not isinstance(region, Blocks):
            raise ThriftyError(f"{name} is quantized, and only blocks of it can be trained, not {region.kind}: {_FIX}")
