"""Projected: a matrix changed inside two fixed subspaces, as a region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import ThriftyError
from .region import EveryNumber

__all__ = ["Projected"]


@dataclass(frozen=True, eq=False)
class Projected(EveryNumber):
    """W + left R right: every number of a matrix changes, only the core R is trained.

    left: `[rows, m]`, its columns orthonormal. right: `[n, columns]`, its rows orthonormal. For a matrix as it is
    stored, `[rows, columns]`; float32, on the CPU. R is `[m, n]`.
    """

    left: Tensor
    right: Tensor
    kind: ClassVar[str] = "projected"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Projected) and torch.equal(self.left, other.left) and torch.equal(self.right, other.right)
        )

    def __hash__(self) -> int:
        return hash((self.left.shape, self.right.shape))

    @property
    def core(self) -> tuple[int, int]:
        """The shape of R."""
        return self.left.shape[1], self.right.shape[0]

    def size(self, shape: Sequence[int]) -> int:
        return self.core[0] * self.core[1]

    def check(self, name: str, shape: Sequence[int]) -> None:
        if len(shape) != 2:
            raise ThriftyError(f"projected needs matrices, but {name} has shape {tuple(shape)}: leave it out")
        found = self.left.shape[0], self.right.shape[1]
        if found != tuple(shape):
            raise ThriftyError(
                f"{name} of shape {tuple(shape)} has subspaces of {found} numbers: the plan is of another model"
            )
        if not (1 <= self.core[0] <= shape[0] and 1 <= self.core[1] <= shape[1]):
            raise ThriftyError(f"{name} of shape {tuple(shape)} cannot be changed by a core of {self.core}")

    def to_files(self) -> tuple[dict[str, Any], Tensor]:
        """The record, and both subspaces in one float32 vector."""
        both = torch.cat([self.left.flatten(), self.right.flatten()])
        return {"kind": self.kind, "left": list(self.left.shape), "right": list(self.right.shape)}, both

    @classmethod
    def from_files(cls, record: dict[str, Any], both: Tensor | None) -> Projected:
        """The region that `to_files` described; ThriftyError where the record makes no sense."""
        if both is None or not both.is_floating_point():
            raise ThriftyError("a projected region needs a tensor of its subspaces")
        (rows, m), (n, columns) = (_pair(record, key) for key in ("left", "right"))
        if both.numel() != rows * m + n * columns:
            raise ThriftyError(f"{both.numel()} numbers are no subspaces of {rows} x {m} and {n} x {columns}")
        left, right = both.split([rows * m, n * columns])
        return cls(left.view(rows, m), right.view(n, columns))


def _pair(record: dict[str, Any], key: str) -> tuple[int, int]:
    found = record.get(key)
    if not isinstance(found, list) or len(found) != 2 or not all(type(n) is int and n > 0 for n in found):
        raise ThriftyError(f"a projected region needs two positive integers as {key}, not {found!r}")
    return found[0], found[1]
