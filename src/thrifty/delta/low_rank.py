"""What changed in one matrix by a low-rank pair: the two factors, and what rounding took from the way back.

The trained matrix is original + scale * left * right, rounded once (`add_product`: the same bits on every machine).
Subtracting the product gives the original but for a few numbers, those whose exponent grew; the difference of the bit
patterns, zero nearly everywhere, is kept compressed. At a change of 1 % of the weights' size it holds about a third of
a bit per number of a float32 matrix and a fifth of a bit of a bfloat16 one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ThriftyError
from ..core.low_rank import LowRank
from ..core.tensor_file import Outline
from ..kernels.low_rank import add_product, subtract_product
from .digest import fingerprint

__all__ = ["LowRankPiece"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(_BITS[tensor.dtype.itemsize])


@dataclass(frozen=True)
class LowRankPiece:
    """`left` `[rows, r]` and `right` `[r, columns]` as the matrix is stored, float32 or wider, on the CPU; `back`:
    uint8, compressed."""

    region: LowRank
    shape: tuple[int, ...]
    dtype: torch.dtype
    left: Tensor
    right: Tensor
    back: Tensor
    fingerprint: str  # of the whole base tensor
    HELD: ClassVar[tuple[str, ...]] = ("left", "right", "back")

    @classmethod
    def of(cls, base: Tensor, left: Tensor, right: Tensor, *, region: LowRank) -> LowRankPiece:
        """The change of `base` by the factors."""
        trained = add_product(base, left, right, scale=region.scale)
        guess = subtract_product(trained, left, right, scale=region.scale)
        lost = _bits(base) - _bits(guess)  # wraps around, so that adding it again is exact whatever the values are
        back = torch.frombuffer(bytearray(zlib.compress(lost.numpy().tobytes())), dtype=torch.uint8)
        factors = left.detach().cpu().contiguous(), right.detach().cpu().contiguous()
        return cls(region, tuple(base.shape), base.dtype, *factors, back, fingerprint(base))

    def _factors(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        return self.left.to(tensor.device), self.right.to(tensor.device)

    def write_(self, tensor: Tensor) -> None:
        """Turn the base `tensor` into the trained one."""
        tensor.data.copy_(add_product(tensor, *self._factors(tensor), scale=self.region.scale))

    def base_of(self, tensor: Tensor) -> Tensor:
        """The base of the trained `tensor`."""
        guess = subtract_product(tensor, *self._factors(tensor), scale=self.region.scale)
        bits = _bits(guess)
        size = bits.numel() * bits.dtype.itemsize
        try:
            data = zlib.decompressobj().decompress(self.back.numpy().tobytes(), size)
        except zlib.error as error:
            raise ThriftyError(f"this delta is damaged ({error}): make or copy it again") from None
        if len(data) != size:
            raise ThriftyError("this delta is damaged: what takes a low-rank pair back is cut off; copy it again")
        lost = torch.from_numpy(np.frombuffer(bytearray(data), dtype=bits.numpy().dtype)).view(bits.shape)
        return (bits + lost).view(guess.dtype).to(tensor.device)

    def to_files(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file needs to hold: a JSON record, and tensors by what they are."""
        record = {"dtype": str(self.dtype).removeprefix("torch.")}
        return record, {"left": self.left, "right": self.right, "back": self.back}

    @classmethod
    def check(
        cls,
        name: str,
        record: Mapping[str, Any],
        outlines: Mapping[str, Outline],
        *,
        region: LowRank,
        shape: tuple[int, ...],
    ) -> None:
        """ThriftyError where a file's record and the outlines of what it holds make no sense; nothing is read."""
        left, right, back = (outlines[key] for key in cls.HELD)
        dtype = getattr(torch, str(record["dtype"]), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ThriftyError(
                f"{name}: the delta's dtype {record['dtype']!r} is no floating-point type: it is damaged"
            )
        fits = left.shape == (shape[0], region.r) and right.shape == (region.r, shape[1])
        if not fits or left.dtype != right.dtype or not left.dtype.is_floating_point or back.dtype != torch.uint8:
            raise ThriftyError(
                f"{name}: the delta's factors {left.shape} and {right.shape} do not make a matrix of {shape} with rank "
                f"{region.r}: it is damaged"
            )
        if not isinstance(record["base_sha256"], str):
            raise ThriftyError(f"{name}: the delta's fingerprint of the base is no text: it is damaged")

    @classmethod
    def from_files(
        cls, record: Mapping[str, Any], held: Mapping[str, Tensor], *, region: LowRank, shape: tuple[int, ...]
    ) -> LowRankPiece:
        """The piece that `to_files` described."""
        dtype = getattr(torch, record["dtype"])
        return cls(region, shape, dtype, held["left"], held["right"], held["back"], record["base_sha256"])
