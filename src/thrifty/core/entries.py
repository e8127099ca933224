"""Entries: single numbers of one parameter tensor as a region."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import ThriftyError
from .region import Blocks, Region, Whole, mask_of

__all__ = ["Entries", "union"]


@dataclass(frozen=True, eq=False)
class Entries:
    """Single numbers of a tensor of any rank. `index`: int64 `[n]`, positions in the flattened tensor as it is stored;
    kept sorted, without duplicates, on the CPU."""

    index: Tensor
    kind: ClassVar[str] = "entries"

    def __post_init__(self) -> None:
        index = self.index.detach().to("cpu", torch.int64)
        if index.ndim != 1:
            raise ThriftyError(f"the index of entries must be [n], not {tuple(index.shape)}")
        unique = torch.unique(index)
        if len(unique) != len(index):
            raise ThriftyError(f"{len(index) - len(unique)} entries are listed twice: list each entry once")
        object.__setattr__(self, "index", unique)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entries) and torch.equal(self.index, other.index)

    def __hash__(self) -> int:
        return hash(tuple(self.index.tolist()))

    def positions(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Row and column `[n]` of each entry of a matrix."""
        return self.index.div(int(shape[1]), rounding_mode="floor"), self.index % int(shape[1])

    def size(self, shape: Sequence[int]) -> int:
        return len(self.index)

    def packed_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (len(self.index),)

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(-1)[self.index.to(tensor.device)]

    @torch.no_grad()
    def scatter_(self, tensor: Tensor, values: Tensor) -> None:
        index = self.index.to(tensor.device)
        tensor.view(-1)[index] = values.flatten().to(device=tensor.device, dtype=tensor.dtype)

    def mask(self, shape: Sequence[int]) -> Tensor:
        return mask_of(self, shape)

    def check(self, name: str, shape: Sequence[int]) -> None:
        if len(self.index) == 0:
            raise ThriftyError(f"{name} has no entry in the plan: leave it out")
        low, high = int(self.index[0]), int(self.index[-1])
        if low < 0 or high >= math.prod(shape):
            bad = low if low < 0 else high
            raise ThriftyError(
                f"entry {bad} lies outside {name} of shape {tuple(shape)} ({math.prod(shape):,} numbers)"
            )

    def to_files(self) -> tuple[dict[str, Any], Tensor]:
        wide = len(self.index) > 0 and int(self.index[-1]) >= 2**31
        return {"kind": self.kind}, self.index if wide else self.index.to(torch.int32)


def union(one: Region, other: Region, shape: Sequence[int]) -> Region:
    """The region of all numbers that lie in `one` or in `other`, of a tensor of `shape`."""
    if one == other or isinstance(one, Whole):
        return one
    if isinstance(other, Whole):
        return other
    if isinstance(one, Blocks) and isinstance(other, Blocks) and one.shape == other.shape:
        return Blocks(one.shape, torch.cat([one.index, other.index]).unique(dim=0))
    return Entries((one.mask(shape) | other.mask(shape)).flatten().nonzero()[:, 0])
