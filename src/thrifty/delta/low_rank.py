"""What changed in one matrix by a low-rank pair: the two factors, and what rounding took from the way back.

The trained matrix is original + scale * left * right, rounded once (`add_product`: the same bits on every machine).
Subtracting the product gives the original but for a few numbers, those whose exponent grew; the difference of the bit
patterns, zero nearly everywhere, is kept compressed. At a change of 1 % of the weights' size it holds about a third of
a bit per number of a float32 matrix and a fifth of a bit of a bfloat16 one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.errors import ThriftyError
from ..core.low_rank import LowRank
from ..core.tensor_file import Outline
from ..kernels.low_rank import add_product, subtract_product
from .back import floating_dtype, pack_back, unpack_back
from .digest import fingerprint

__all__ = ["LowRankPiece"]


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
        factors = left.detach().cpu().contiguous(), right.detach().cpu().contiguous()
        return cls(region, tuple(base.shape), base.dtype, *factors, pack_back(base, guess), fingerprint(base))

    def factors(self) -> tuple[Tensor, Tensor]:
        """`left`, with the scale in it, and `right`: their product is the change."""
        return self.left * self.region.scale, self.right

    def change(self) -> Tensor:
        """How far the matrix moves, float64."""
        return self.region.scale * (self.left.double() @ self.right.double())

    def _factors(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        return self.left.to(tensor.device), self.right.to(tensor.device)

    def write_(self, tensor: Tensor) -> None:
        """Turn the base `tensor` into the trained one."""
        tensor.data.copy_(add_product(tensor, *self._factors(tensor), scale=self.region.scale))

    def base_of(self, tensor: Tensor) -> Tensor:
        """The base of the trained `tensor`."""
        guess = subtract_product(tensor, *self._factors(tensor), scale=self.region.scale)
        return unpack_back(self.back, guess).to(tensor.device)

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
        floating_dtype(name, record)
        fits = left.shape == (shape[0], region.r) and right.shape == (region.r, shape[1])
        if not fits or left.dtype != right.dtype or not left.dtype.is_floating_point or back.dtype != torch.uint8:
            raise ThriftyError(
                f"{name}: the delta's factors {left.shape} and {right.shape} do not make a matrix of {shape} with rank "
                f"{region.r}: it is damaged"
            )

    @classmethod
    def from_files(
        cls, record: Mapping[str, Any], held: Mapping[str, Tensor], *, region: LowRank, shape: tuple[int, ...]
    ) -> LowRankPiece:
        """The piece that `to_files` described."""
        dtype = getattr(torch, record["dtype"])
        return cls(region, shape, dtype, held["left"], held["right"], held["back"], record["base_sha256"])
