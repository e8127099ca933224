"""Regions: which numbers of one parameter tensor are trained.

A region knows nothing of values. It counts, gathers from and scatters to a tensor, and draws itself as a boolean mask.
`Whole` and `Entries` (`entries.py`) take tensors of any rank, `Blocks` matrices `[out, in]` and stacked experts
`[experts, out, in]`; rows and columns are blocks. Packed blocks are ordered group by group: whole ones first, then the
smaller ones of the bottom edge, the right edge and the corner, so that each group is one dense `[n, h, w]` piece.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .errors import ThriftyError

__all__ = ["BlockGroup", "Blocks", "EveryNumber", "Region", "Whole", "mask_of"]


class Region(Protocol):
    """Which numbers of one tensor are trained; `shape` is always the shape of that tensor."""

    kind: ClassVar[str]

    def size(self, shape: Sequence[int]) -> int:
        """How many numbers."""
        ...

    def packed_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the packed values: `[n, h, w]` where all blocks are alike, else flat."""
        ...

    def gather(self, tensor: Tensor) -> Tensor:
        """The region's values, packed, as a copy."""
        ...

    def scatter_(self, tensor: Tensor, values: Tensor) -> None:
        """Write packed `values` into `tensor`, cast to its dtype."""
        ...

    def mask(self, shape: Sequence[int]) -> Tensor:
        """A boolean tensor of `shape`, true where the region is."""
        ...

    def check(self, name: str, shape: Sequence[int]) -> None:
        """ThriftyError where the region does not lie in a tensor of `shape`."""
        ...

    def to_files(self) -> tuple[dict[str, Any], Tensor | None]:
        """What a file needs to hold: a JSON record and an index tensor (int32), if any."""
        ...


def mask_of(region: Region, shape: Sequence[int]) -> Tensor:
    out = torch.zeros(tuple(shape), dtype=torch.bool)
    region.scatter_(out, torch.ones(region.packed_shape(shape), dtype=torch.bool))
    return out


class EveryNumber:
    """What regions share that change all of their tensor."""

    def packed_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of the numbers that change: all of them."""
        return tuple(shape)

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor.detach().clone()

    @torch.no_grad()
    def scatter_(self, tensor: Tensor, values: Tensor) -> None:
        tensor.copy_(values)

    def mask(self, shape: Sequence[int]) -> Tensor:
        return torch.ones(tuple(shape), dtype=torch.bool)


@dataclass(frozen=True)
class Whole(EveryNumber):
    """Every number of the tensor, of any rank."""

    kind: ClassVar[str] = "whole"

    def size(self, shape: Sequence[int]) -> int:
        return math.prod(shape)

    def check(self, name: str, shape: Sequence[int]) -> None:
        if math.prod(shape) == 0:
            raise ThriftyError(f"{name} has shape {tuple(shape)} and holds no number to train: leave it out")

    def to_files(self) -> tuple[dict[str, Any], None]:
        return {"kind": self.kind}, None


@dataclass(frozen=True)
class BlockGroup:
    """Blocks of one actual size `h` x `w`: where each starts in the flattened matrix `[experts * out, in]`."""

    h: int
    w: int
    rows: Tensor  # [n] first row of each block
    cols: Tensor  # [n] first column of each block
    offset: int  # where the group starts in the packed values

    @property
    def numbers(self) -> int:
        return len(self.rows) * self.h * self.w

    def element_index(self) -> tuple[Tensor, Tensor]:
        """Row `[n, h, 1]` and column `[n, 1, w]` of every number."""
        rows = self.rows[:, None] + torch.arange(self.h, device=self.rows.device)
        cols = self.cols[:, None] + torch.arange(self.w, device=self.cols.device)
        return rows[:, :, None], cols[:, None, :]


_LARGE = 4096  # numbers of a block from which a copy of its own is faster than an index, on a CPU


def _write(matrix: Tensor, group: BlockGroup, piece: Tensor) -> None:
    """Write the blocks `piece` `[n, h, w]` of `group` into `matrix`: at every optimizer step, so it must be quick."""
    _, h, w = piece.shape
    if (h, w) == (1, matrix.shape[1]):
        matrix.index_copy_(0, group.rows.to(matrix.device), piece[:, 0])
    elif (h, w) == (matrix.shape[0], 1):
        matrix.index_copy_(1, group.cols.to(matrix.device), piece[:, :, 0].t())
    elif matrix.device.type == "cpu" and h * w >= _LARGE:
        for k, (row, col) in enumerate(zip(group.rows.tolist(), group.cols.tolist(), strict=True)):
            matrix[row : row + h, col : col + w] = piece[k]
    else:
        rows, cols = group.element_index()
        matrix[rows.to(matrix.device), cols.to(matrix.device)] = piece


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of `shape` (rows, columns) of a matrix; edge blocks are smaller where the size does not divide.

    `index`: int64 `[n, 2]` (block row, block column), or `[n, 3]` (expert, block row, block column) for stacked
    experts; kept sorted, without duplicates, on the CPU. A whole column is a block of shape `(out, 1)`, a whole row
    `(1, in)`.
    """

    shape: tuple[int, int]
    index: Tensor
    _groups: dict[tuple[int, int], tuple[BlockGroup, ...]] = field(init=False, repr=False)
    kind: ClassVar[str] = "blocks"

    def __post_init__(self) -> None:
        index = self.index.detach().to("cpu", torch.int64)
        if index.ndim != 2 or index.shape[1] not in (2, 3):
            raise ThriftyError(f"block index must be [n, 2] or [n, 3], not {tuple(index.shape)}")
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ThriftyError(f"block shape must be two positive numbers (rows, columns), not {tuple(self.shape)}")
        unique = torch.unique(index, dim=0) if len(index) else index
        if len(unique) != len(index):
            raise ThriftyError(f"{len(index) - len(unique)} blocks are listed twice: list each block once")
        object.__setattr__(self, "shape", (int(self.shape[0]), int(self.shape[1])))
        object.__setattr__(self, "index", unique)
        object.__setattr__(self, "_groups", {})  # by matrix shape: asked for at every write, and by compiled code

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blocks) and self.shape == other.shape and torch.equal(self.index, other.index)

    def __hash__(self) -> int:
        return hash((self.shape, tuple(self.index.flatten().tolist())))

    def groups(self, shape: Sequence[int]) -> tuple[BlockGroup, ...]:
        """The blocks by actual size, in packed order."""
        key = (int(shape[-2]), int(shape[-1]))
        if key not in self._groups:
            self._groups[key] = self._grouped(*key)
        return self._groups[key]

    def _grouped(self, out: int, columns: int) -> tuple[BlockGroup, ...]:
        (h, w), index = self.shape, self.index
        expert = index[:, 0] if index.shape[1] == 3 else torch.zeros(len(index), dtype=torch.int64)
        row, col = index[:, -2] * h, index[:, -1] * w
        low, right = row + h > out, col + w > columns
        groups, offset = [], 0
        for at_bottom in (False, True):
            for at_right in (False, True):
                here = (low == at_bottom) & (right == at_right)
                if not bool(here.any()):
                    continue
                rows = (expert * out + row)[here]
                group = BlockGroup(
                    h=out % h if at_bottom else h,
                    w=columns % w if at_right else w,
                    rows=rows,
                    cols=col[here],
                    offset=offset,
                )
                groups.append(group)
                offset += group.numbers
        return tuple(groups)

    def size(self, shape: Sequence[int]) -> int:
        return sum(group.numbers for group in self.groups(shape))

    def packed_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        groups = self.groups(shape)
        if len(groups) == 1:
            return (len(groups[0].rows), groups[0].h, groups[0].w)
        return (sum(group.numbers for group in groups),)

    def gather(self, tensor: Tensor) -> Tensor:
        matrix = tensor.detach().reshape(-1, tensor.shape[-1])
        pieces = []
        for group in self.groups(tensor.shape):
            rows, cols = group.element_index()
            pieces.append(matrix[rows.to(tensor.device), cols.to(tensor.device)].flatten())
        flat = torch.cat(pieces) if pieces else matrix.new_empty(0)
        return flat.view(self.packed_shape(tensor.shape))

    @torch.no_grad()
    def scatter_(self, tensor: Tensor, values: Tensor) -> None:
        matrix, flat = tensor.view(-1, tensor.shape[-1]), values.flatten()
        for group in self.groups(tensor.shape):
            piece = flat[group.offset : group.offset + group.numbers].view(-1, group.h, group.w)
            _write(matrix, group, piece.to(device=tensor.device, dtype=tensor.dtype))

    def mask(self, shape: Sequence[int]) -> Tensor:
        return mask_of(self, shape)

    def check(self, name: str, shape: Sequence[int]) -> None:
        if len(shape) != self.index.shape[1]:
            raise ThriftyError(
                f"{name} has shape {tuple(shape)}, but its blocks are indexed by {self.index.shape[1]} axes"
            )
        if len(self.index) == 0:
            raise ThriftyError(f"{name} has no block in the plan: leave it out")
        h, w = self.shape
        grid = torch.tensor([*shape[:-2], -(-shape[-2] // h), -(-shape[-1] // w)])
        bad = ((self.index < 0) | (self.index >= grid)).any(dim=1)
        if bool(bad.any()):
            first = tuple(self.index[bad][0].tolist())
            raise ThriftyError(
                f"block {first} of shape {self.shape} lies outside {name} of shape {tuple(shape)} "
                f"(a grid of {tuple(grid.tolist())} blocks)"
            )

    def to_files(self) -> tuple[dict[str, Any], Tensor]:
        return {"kind": self.kind, "shape": list(self.shape)}, self.index.to(torch.int32)
