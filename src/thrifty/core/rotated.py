"""Rotated: a matrix changed in a rotated basis, as a region."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import ThriftyError
from .region import EveryNumber

__all__ = ["Basis", "Rotated"]


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthogonal factors of all matrices of one type, float32 on the CPU: `rows` `[r, r]` and `columns` `[c, c]` for
    matrices stored as `[..., r, c]`. The columns of a factor are the new axes."""

    rows: Tensor
    columns: Tensor
    _placed: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(
        init=False, repr=False, default_factory=dict
    )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Basis) and torch.equal(self.rows, other.rows) and torch.equal(self.columns, other.columns)
        )

    def __hash__(self) -> int:
        return hash((self.rows.shape, self.columns.shape))

    def factors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Both where `like` is, in its dtype or float32 if that is narrower; copied there once."""
        key = like.device, torch.promote_types(like.dtype, torch.float32)
        placed = self._placed.get(key)
        if placed is None:
            placed = self.rows.to(*key), self.columns.to(*key)
            if not torch.compiler.is_compiling():
                self._placed[key] = placed
        return placed

    def gather(self, dense: Tensor) -> Tensor:
        """`dense` `[..., r, c]` (a gradient, a weight) seen in the basis: rows^T D columns."""
        rows, columns = self.factors(dense)
        with torch.autocast(dense.device.type, enabled=False):
            return rows.t() @ dense.detach().to(rows.dtype) @ columns

    def back(self, rotated: Tensor) -> Tensor:
        """The way back: rows R columns^T. Never in the narrow dtype of an autocast around it."""
        rows, columns = self.factors(rotated)
        with torch.autocast(rotated.device.type, enabled=False):
            return rows @ rotated.detach().to(rows.dtype) @ columns.t()


@dataclass(frozen=True)
class Rotated(EveryNumber):
    """W + rows S columns^T: every number of a matrix changes; in each step `k` numbers of S get a gradient."""

    basis: Basis
    k: int
    kind: ClassVar[str] = "rotated"

    def size(self, shape: Sequence[int]) -> int:
        """Numbers that one step trains; which ones changes from step to step."""
        return self.k

    def check(self, name: str, shape: Sequence[int]) -> None:
        if len(shape) not in (2, 3):
            raise ThriftyError(f"a rotated basis needs matrices, but {name} has shape {tuple(shape)}: leave it out")
        r, c = shape[-2:]
        if self.basis.rows.shape != (r, r) or self.basis.columns.shape != (c, c):
            found = f"{tuple(self.basis.rows.shape)} and {tuple(self.basis.columns.shape)}"
            raise ThriftyError(f"{name} of shape {tuple(shape)} has factors of {found}: the plan is of another model")
        if not 1 <= self.k <= math.prod(shape):
            raise ThriftyError(f"{name} holds {math.prod(shape):,} numbers, but {self.k} are asked for in each step")

    def to_files(self) -> tuple[dict[str, Any], Tensor]:
        """The record, and both factors in one float32 vector."""
        factors = torch.cat([self.basis.rows.flatten(), self.basis.columns.flatten()])
        return {"kind": self.kind, "k": self.k, "rows": len(self.basis.rows)}, factors

    @classmethod
    def from_files(cls, record: dict[str, Any], factors: Tensor | None) -> Rotated:
        """The region that `to_files` described; ThriftyError where the record makes no sense."""
        k, rows = record.get("k"), record.get("rows")
        if type(k) is not int or type(rows) is not int or factors is None or not factors.is_floating_point():
            raise ThriftyError("a rotated region needs integers k and rows, and a tensor of its factors")
        columns = math.isqrt(max(0, factors.numel() - rows**2))
        if rows < 1 or rows**2 + columns**2 != factors.numel():
            raise ThriftyError(f"{factors.numel()} numbers are no factors of {rows} rows and any number of columns")
        left, right = factors.split([rows**2, columns**2])
        return cls(Basis(left.view(rows, rows), right.view(columns, columns)), k)
