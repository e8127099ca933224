"""LowRank: a matrix changed by a product of two thin ones, as a region."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .errors import ThriftyError
from .region import EveryNumber

__all__ = ["LowRank"]


@dataclass(frozen=True)
class LowRank(EveryNumber):
    """W + (alpha / r) B A: every number of a matrix changes, `r * (rows + columns)` numbers are trained."""

    r: int
    alpha: float
    kind: ClassVar[str] = "low_rank"

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.r

    def size(self, shape: Sequence[int]) -> int:
        return self.r * (int(shape[0]) + int(shape[1]))

    def check(self, name: str, shape: Sequence[int]) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ThriftyError(f"alpha {self.alpha!r} is not valid: give a number above 0, such as 16")
        if len(shape) != 2:
            raise ThriftyError(f"low_rank needs matrices, but {name} has shape {tuple(shape)}: leave it out")
        if not 1 <= self.r <= min(shape):
            raise ThriftyError(
                f"r {self.r} is not valid for {name} of shape {tuple(shape)}: give a rank from 1 to {min(shape)}"
            )

    def to_files(self) -> tuple[dict[str, Any], None]:
        return {"kind": self.kind, "r": self.r, "alpha": self.alpha}, None
