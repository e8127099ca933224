"""Plain torch ways to the blocks of `dy^T x`, and the rule that chooses one for each group of equal blocks.

A way is built once, when the blocks and the strip are known, and holds every index tensor it needs; its `into` does
only products and copies. Shapes as in `region_grad`; `out` is `[n, h, w]` in the dtype of `dy`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Runs", "StripGroup", "Way", "choose"]

# Measured on one AVX-512 core (docs/kernels.md).
_NARROW = 16  # blocks narrower than this never go one by one; a product is turned so that such a side is not its last
_LONG = 32  # blocks with longer sides run at full speed one by one
_PER_LINE = 3  # blocks of a line that pay for gathering them
_ONE = 16  # lines with a shared side s take about 1 + 16 / s times an ideal product, which one product over all avoids
_BY_SLOT = 4  # lines along rows are faster at the same number of lines, but not at four times as many


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
    """Columns to gather. `index` counts pieces of `piece` columns: a piece is one copy, up to 40 times faster than its
    columns one by one. None where the columns are one stretch, which needs no copy."""

    start: int
    width: int
    piece: int
    index: Tensor | None

    @classmethod
    def of(cls, columns: Tensor) -> Runs:
        """`columns`: int64 `[width]` on the CPU, at least one, in any order."""
        starts = torch.cat([columns[:1], columns[1:][columns.diff() != 1]])
        if len(starts) == 1:
            return cls(int(columns[0]), len(columns), 1, None)
        ends = torch.cat([columns[:-1][columns.diff() != 1], columns[-1:]]) + 1
        piece = math.gcd(*starts.tolist(), *ends.tolist())
        return cls(int(columns[0]), len(columns), piece, columns[::piece] // piece)

    def take(self, a_TA: Tensor) -> Tensor:
        """The columns side by side, `[T, width]`; a view where they are one stretch."""
        if self.index is None:
            return a_TA[:, self.start : self.start + self.width]
        pieces = a_TA.shape[1] // self.piece
        return a_TA[:, : pieces * self.piece].unflatten(1, (pieces, self.piece)).index_select(1, self.index).flatten(1)

    def to(self, device: torch.device) -> Runs:
        return self if self.index is None else replace(self, index=self.index.to(device))


def _spread(starts: Tensor, size: int) -> Tensor:
    """The columns of runs of `size` that begin at `starts`."""
    return (starts[:, None] + torch.arange(size)).flatten()


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
    """One product for all blocks of a line (same row start, or same column start), their other sides put together."""

    h: int
    w: int
    by_row: bool
    side: Runs  # the other side's runs, each once
    index: Tensor  # [n] which of them each block has, in line order
    lines: tuple[tuple[int, int], ...]  # where the shared side starts, how many blocks
    order: Tensor | None  # packed order from line order; None where they are the same

    @classmethod
    def of(cls, group: StripGroup, *, by_row: bool) -> LineByLine:
        shared, other = (group.rows, group.slots) if by_row else (group.slots, group.rows)
        members: dict[int, list[int]] = defaultdict(list)
        for k, start in enumerate(shared):
            members[start].append(k)
        line_order = torch.tensor([k for blocks in members.values() for k in blocks])
        same = torch.equal(line_order, torch.arange(len(line_order)))
        starts, index = torch.tensor(other).unique(return_inverse=True)
        return cls(
            h=group.h,
            w=group.w,
            by_row=by_row,
            side=Runs.of(_spread(starts, group.w if by_row else group.h)),
            index=index[line_order],
            lines=tuple((start, len(blocks)) for start, blocks in members.items()),
            order=None if same else line_order.argsort(),
        )

    def into(self, dy_TO: Tensor, x_TU: Tensor, out: Tensor) -> None:
        a_TA, b_TB, a, b = (x_TU, dy_TO, self.w, self.h) if self.by_row else (dy_TO, x_TU, self.h, self.w)
        # tokens innermost: blocks are then gathered in long copies, and BLAS is faster on what is gathered
        a_kaT = self.side.take(a_TA).t().contiguous().view(self.side.width // a, a, a_TA.shape[0])
        n, at, wide = len(self.index), 0, b < _NARROW
        buffer = a_TA.new_empty((b, n * a) if wide else (n * a, b))
        for start, count in self.lines:
            gathered = a_kaT.index_select(0, self.index[at : at + count]).flatten(0, 1)
            line, here = b_TB[:, start : start + b], slice(at * a, (at + count) * a)
            if wide:
                buffer[:, here] = line.t() @ gathered.t()  # a compiler takes `out=` only where it is contiguous
            else:
                torch.mm(gathered, line, out=buffer[here])
            at += count
        blocks = buffer.view(b, n, a).transpose(0, 1) if wide else buffer.view(n, a, b).mT
        blocks = blocks if self.by_row else blocks.mT
        out.copy_(blocks if self.order is None else blocks.index_select(0, self.order))

    def to(self, device: torch.device) -> LineByLine:
        order = None if self.order is None else self.order.to(device)
        return replace(self, side=self.side.to(device), index=self.index.to(device), order=order)


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
            Runs.of(_spread(rows, group.h)),
            Runs.of(_spread(cols, group.w)),
            None if full else (i, j),
        )

    def into(self, dy_TO: Tensor, x_TU: Tensor, out: Tensor) -> None:
        a, b, h, w = self.rows.take(dy_TO), self.cols.take(x_TU), self.h, self.w
        down, across = self.rows.width // h, self.cols.width // w
        if self.cols.width < self.rows.width:
            grid = (b.t().contiguous() @ a).view(across, w, down, h).permute(2, 0, 3, 1)
        else:
            grid = (a.t() @ b).view(down, h, across, w).transpose(1, 2)
        if self.pick is None:
            out.view(down, across, h, w).copy_(grid)
        else:
            out.copy_(grid[self.pick])

    def to(self, device: torch.device) -> OneProduct:
        pick = None if self.pick is None else (self.pick[0].to(device), self.pick[1].to(device))
        return replace(self, rows=self.rows.to(device), cols=self.cols.to(device), pick=pick)


def choose(group: StripGroup) -> Way:
    """The way that is fastest on a CPU for `group`; see the constants for what was measured."""
    n, rows, cols, side = len(group.rows), len(set(group.rows)), len(set(group.slots)), min(group.h, group.w)
    by_row = rows <= _BY_SLOT * cols
    lines, shared = (rows, group.h) if by_row else (cols, group.w)
    if n * (1 + _ONE / shared) >= rows * cols:
        return OneProduct.of(group)
    if side < _NARROW or (side <= _LONG and n >= _PER_LINE * lines):
        return LineByLine.of(group, by_row=by_row)
    return BlockByBlock(group)
