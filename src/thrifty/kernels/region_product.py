"""Products with a region alone: its blocks of a matrix times a strip, without the dense matrix.

Shapes: T tokens, A columns read, B columns written. A line is all blocks that write to the same columns, or all that
read the same ones: one product each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .region_ways import Runs, StripGroup

__all__ = ["RegionProduct"]

_GATHER = 4  # lines that gather need no scattered sum, so they may be more by this factor


def _add_columns(y_TB: Tensor, runs: Runs, values_TC: Tensor) -> None:
    """Add `values_TC` to the columns `runs` of `y_TB` (contiguous rows)."""
    if runs.index is None:
        y_TB[:, runs.start : runs.start + runs.width] += values_TC
        return
    pieces = y_TB.shape[1] // runs.piece
    target = y_TB[:, : pieces * runs.piece].unflatten(1, (pieces, runs.piece))
    target.index_add_(1, runs.index, values_TC.unflatten(1, (-1, runs.piece)))


@dataclass(frozen=True)
class _Lines:
    """One group of equal blocks, line by line. `gathers`: a line writes one stretch and reads many; else the other way
    round."""

    to_rows: bool
    gathers: bool
    lines: tuple[tuple[int, Runs, int], ...]  # where the shared stretch starts, the other columns, how many blocks
    order: Tensor | None  # line order from packed order; None where they are the same

    @classmethod
    def of(cls, group: StripGroup, *, to_rows: bool) -> _Lines:
        read, written = (group.slots, group.rows) if to_rows else (group.rows, group.slots)
        gathers = len(set(written)) <= _GATHER * len(set(read))
        shared, other = (written, read) if gathers else (read, written)
        members: dict[int, list[int]] = defaultdict(list)
        for k, start in enumerate(shared):
            members[start].append(k)
        size = group.w if to_rows == gathers else group.h
        across = torch.arange(size)
        lines = tuple(
            (start, Runs.of((torch.tensor([other[k] for k in blocks])[:, None] + across).flatten()), len(blocks))
            for start, blocks in members.items()
        )
        order = torch.tensor([k for blocks in members.values() for k in blocks])
        same = torch.equal(order, torch.arange(len(order)))
        return cls(to_rows, gathers, lines, None if same else order)

    def add(self, x_TA: Tensor, blocks_nhw: Tensor, y_TB: Tensor) -> None:
        """Add to `y_TB` what the blocks make of `x_TA`."""
        blocks = blocks_nhw if self.order is None else blocks_nhw.index_select(0, self.order)
        matrices = blocks.mT if self.to_rows else blocks  # [n, columns read, columns written]
        (_, a, b), at = matrices.shape, 0
        for start, runs, count in self.lines:
            here = matrices[at : at + count]
            at += count
            if self.gathers:
                y_TB[:, start : start + b].addmm_(runs.take(x_TA), here.reshape(count * a, b))
            else:
                _add_columns(y_TB, runs, x_TA[:, start : start + a] @ here.transpose(0, 1).reshape(a, count * b))

    def to(self, device: torch.device) -> _Lines:
        lines = tuple((start, runs.to(device), count) for start, runs, count in self.lines)
        return replace(self, lines=lines, order=None if self.order is None else self.order.to(device))


class RegionProduct:
    """`y[:, rows_k] += x[:, slots_k] P_k^T` for each block P_k of `groups` (`to_rows`), or `y[:, slots_k] +=
    x[:, rows_k] P_k`. Made once: it holds every index that it needs."""

    def __init__(self, groups: Iterable[StripGroup], *, to_rows: bool) -> None:
        self._groups = tuple(groups)
        self._lines = {torch.device("cpu"): tuple(_Lines.of(group, to_rows=to_rows) for group in self._groups)}

    def _on(self, device: torch.device) -> tuple[_Lines, ...]:
        if device in self._lines:
            return self._lines[device]
        lines = tuple(one.to(device) for one in self._lines[torch.device("cpu")])
        if not torch.compiler.is_compiling():
            self._lines[device] = lines
        return lines

    def __call__(self, x_TA: Tensor, packed: Tensor, *, width: int) -> Tensor:
        """`[T, width]`, of `x_TA` and the packed blocks, both of one dtype."""
        y_TB, flat = x_TA.new_zeros(x_TA.shape[0], width), packed.flatten()
        for group, lines in zip(self._groups, self._on(x_TA.device), strict=True):
            blocks = flat[group.offset : group.offset + group.numbers].view(len(group.rows), group.h, group.w)
            lines.add(x_TA, blocks, y_TB)
        return y_TB
