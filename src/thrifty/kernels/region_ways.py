"""Plain torch ways to the blocks of `dy^T x`, and the rule that chooses one for each group of equal blocks.

A way is built once, when the blocks and the strip are known, and holds every index tensor it needs; its `into` does
only products and copies. Shapes as in `region_grad`; `out` is `[n, h, w]` in the dtype of `dy`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["StripGroup", "Way", "choose"]

# Measured on one AVX-512 core in float32 (docs/performance.md): the two other ways take about 1 + 16 / min(h, w) times
# an ideal product's time, so one product over everything wins where the blocks fill more than the inverse of it.
_GRID = 16
_PER_LINE = 2.0  # blocks of a line that pay for gathering their side
_LINE_SIDE = 64  # blocks with longer sides run at full speed one by one
_WIDE = 16  # a product's last side should not be narrower than this: BLAS puts its vectors along it


@dataclass(frozen=True)
class StripGroup:
    """Blocks of one size: `rows[k]` starts block k among the outputs, `slots[k]` among the strip's columns."""

    h: int
    w: int
    rows: tuple[int, ...]
    slots: tuple[int, ...]
    offset: int

    @property
    def numbers(self) -> int:
        return len(self.rows) * self.h * self.w


class Way(Protocol):
    """How one group's blocks are computed."""

    def into(self, dy_TO: Tensor, x_TU: Tensor, out: Tensor) -> None:
        """Write the blocks into `out` `[n, h, w]`."""
        ...

    def to(self, device: torch.device) -> Way:
        """The same with its index tensors on `device`."""
        ...


@dataclass(frozen=True)
class Runs:
    """Equal runs of columns. `index` counts pieces of `piece` columns: copying pieces is up to 25 times faster than
    copying single columns. None where the runs are one stretch and need no copy."""

    start: int
    width: int
    piece: int
    index: Tensor | None

    @classmethod
    def of(cls, starts: Sequence[int], size: int) -> Runs:
        width = len(starts) * size
        if all(b == a + size for a, b in zip(starts, starts[1:])):
            return cls(starts[0], width, size, None)
        piece = math.gcd(size, *starts)
        index = torch.tensor(starts)[:, None] + torch.arange(0, size, piece)
        return cls(starts[0], width, piece, index.flatten() // piece)

    def take(self, a_TA: Tensor) -> Tensor:
        """The columns side by side, `[T, width]`."""
        if self.index is None:
            return a_TA[:, self.start : self.start + self.width]
        pieces = a_TA.shape[1] // self.piece
        return a_TA[:, : pieces * self.piece].unflatten(1, (pieces, self.piece)).index_select(1, self.index).flatten(1)

    def to(self, device: torch.device) -> Runs:
        return Runs(self.start, self.width, self.piece, None if self.index is None else self.index.to(device))


@dataclass(frozen=True)
class BlockByBlock:
    """One product for each block, straight into its place."""

    group: StripGroup

    def into(self, dy_TO: Tensor, x_TU: Tensor, out: Tensor) -> None:
        dy_OT, h, w = dy_TO.t(), self.group.h, self.group.w
        for k, (row, slot) in enumerate(zip(self.group.rows, self.group.slots, strict=True)):
            torch.mm(dy_OT[row : row + h], x_TU[:, slot : slot + w], out=out[k])

    def to(self, device: torch.device) -> BlockByBlock:
        return self


@dataclass(frozen=True)
class LineByLine:
    """One product for all blocks of a line (same row start, or same column start): their other sides side by side."""

    h: int
    w: int
    by_row: bool
    lines: tuple[tuple[int, Runs], ...]  # where the shared side starts, the other sides
    order: Tensor | None  # packed order from line order; None where they are the same

    @classmethod
    def of(cls, group: StripGroup, *, by_row: bool) -> LineByLine:
        shared, other = (group.rows, group.slots) if by_row else (group.slots, group.rows)
        size = group.w if by_row else group.h
        members: dict[int, list[int]] = defaultdict(list)
        for k, start in enumerate(shared):
            members[start].append(k)
        lines = tuple((start, Runs.of([other[k] for k in blocks], size)) for start, blocks in members.items())
        order = torch.tensor([k for blocks in members.values() for k in blocks]).argsort()
        same = torch.equal(order, torch.arange(len(order)))
        return cls(group.h, group.w, by_row, lines, None if same else order)

    def into(self, dy_TO: Tensor, x_TU: Tensor, out: Tensor) -> None:
        a, b, a_side, b_side = (x_TU, dy_TO, self.w, self.h) if self.by_row else (dy_TO, x_TU, self.h, self.w)
        n, at, wide = out.shape[0], 0, b_side < _WIDE
        buffer = a.new_empty((b_side, n * a_side) if wide else (n * a_side, b_side))
        for start, runs in self.lines:
            gathered, line, end = runs.take(a), b[:, start : start + b_side], at + runs.width
            if wide:
                torch.mm(line.t(), gathered, out=buffer[:, at:end])
            else:
                torch.mm(gathered.t(), line, out=buffer[at:end])
            at = end
        blocks = buffer.view(b_side, n, a_side).transpose(0, 1) if wide else buffer.view(n, a_side, b_side).mT
        blocks = blocks if self.by_row else blocks.mT
        out.copy_(blocks if self.order is None else blocks.index_select(0, self.order))

    def to(self, device: torch.device) -> LineByLine:
        lines = tuple((start, runs.to(device)) for start, runs in self.lines)
        return LineByLine(self.h, self.w, self.by_row, lines, None if self.order is None else self.order.to(device))


@dataclass(frozen=True)
class OneProduct:
    """One product over all used rows and columns, then the blocks picked out: whole columns and rows, dense parts."""

    h: int
    w: int
    rows: Runs
    cols: Runs
    pick: tuple[Tensor, Tensor] | None  # block row and column of each block; None where all are used, in order

    @classmethod
    def of(cls, group: StripGroup) -> OneProduct:
        rows, i = torch.tensor(group.rows).unique(return_inverse=True)
        cols, j = torch.tensor(group.slots).unique(return_inverse=True)
        full = torch.equal(i * len(cols) + j, torch.arange(len(rows) * len(cols)))
        return cls(
            group.h,
            group.w,
            Runs.of(rows.tolist(), group.h),
            Runs.of(cols.tolist(), group.w),
            None if full else (i, j),
        )

    def into(self, dy_TO: Tensor, x_TU: Tensor, out: Tensor) -> None:
        a, b, h, w = self.rows.take(dy_TO), self.cols.take(x_TU), self.h, self.w
        down, across = self.rows.width // h, self.cols.width // w
        if self.cols.width < self.rows.width:
            grid = (b.t() @ a).view(across, w, down, h).permute(2, 0, 3, 1)
        else:
            grid = (a.t() @ b).view(down, h, across, w).transpose(1, 2)
        if self.pick is None:
            out.view(down, across, h, w).copy_(grid)
        else:
            out.copy_(grid[self.pick])

    def to(self, device: torch.device) -> OneProduct:
        pick = None if self.pick is None else (self.pick[0].to(device), self.pick[1].to(device))
        return OneProduct(self.h, self.w, self.rows.to(device), self.cols.to(device), pick)


def choose(group: StripGroup) -> Way:
    """The way that is fastest on a CPU for `group`; see the constants for what was measured."""
    n, rows, cols, side = len(group.rows), len(set(group.rows)), len(set(group.slots)), min(group.h, group.w)
    if n * (1 + _GRID / side) >= rows * cols:
        return OneProduct.of(group)
    if side <= _LINE_SIDE and n >= _PER_LINE * min(rows, cols):
        return LineByLine.of(group, by_row=rows <= cols)
    return BlockByBlock(group)
