"""How much a heap holds for blocks that come and go: glibc's, from which PyTorch takes CPU tensors.

A block is asked for with 64 bytes of alignment, which glibc finds by taking that much more and giving the ends back
(seen in 2.36). Where a small object settles in such an end, the hole that the block leaves is too small for the next of
its size. Without this a resident peak cannot be told from what lives: it is 1.4 to 2 times that. Which ends are settled
is not known: a fixed share of them, spread evenly, fitted to measured peaks (docs/estimate.md).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence

__all__ = ["MAPPED_BYTES", "Event", "Heap", "beyond"]

Event = tuple[int, int]  # a block's number and its bytes; 0 bytes: it is freed

_ALIGNMENT = 64  # of PyTorch's CPU tensors
_LEAST = 32  # of a chunk
MAPPED_BYTES = 32 * 2**20  # larger blocks are mapped by themselves, and given back when freed


class Heap:
    """Best fit, neighbours joined, the top grown where nothing fits. `high`: the most bytes that were held. `settled`:
    the share of blocks' ends that small objects take."""

    def __init__(self, *, settled: float = 0.0) -> None:
        self.top = self.mapped = self.high = self._ends = 0
        self._settled = settled
        self._free: list[tuple[int, int]] = []  # (size, start), sorted
        self._size_at: dict[int, int] = {}  # of free chunks, by start
        self._start_of: dict[int, int] = {}  # of free chunks, by end
        self._chunks: dict[int, tuple[int, int]] = {}  # taken blocks: (start, size); start -1 where mapped

    def take(self, block: int, size: int) -> None:
        """Place `block` of `size` bytes."""
        needed = max(_LEAST, (size + 8 + 15) // 16 * 16)
        asked = needed + _ALIGNMENT + _LEAST
        if asked >= MAPPED_BYTES:
            pages = -(-asked // 4096) * 4096
            self._chunks[block] = (-1, pages)
            self.mapped += pages
        else:
            start, found = self._best(asked)
            aligned = -(-(start + 16) // _ALIGNMENT) * _ALIGNMENT - 16
            if start < aligned < start + _LEAST:
                aligned += _ALIGNMENT
            self._give_end(start, aligned - start)
            end = aligned + needed
            if start + found - end >= _LEAST:
                self._give_end(end, start + found - end)
            else:
                end = start + found
            self._chunks[block] = (aligned, end - aligned)
        self.high = max(self.high, self.top + self.mapped)

    def give(self, block: int) -> None:
        """Free `block`, if it is there."""
        start, size = self._chunks.pop(block, (0, 0))
        if start == -1:
            self.mapped -= size
        elif size:
            self._add(start, size)

    def _give_end(self, start: int, size: int) -> None:
        """Free what was cut off a block, unless it is small and settled."""
        if 0 < size <= 2 * (_ALIGNMENT + _LEAST):
            before, self._ends = math.floor(self._ends * self._settled), self._ends + 1
            if math.floor(self._ends * self._settled) > before:
                return
        self._add(start, size)

    def _best(self, asked: int) -> tuple[int, int]:
        place = bisect_left(self._free, (asked, 0))
        if place < len(self._free):
            size, start = self._free[place]
            self._remove(start)
            return start, size
        start = self.top
        self.top += asked
        return start, asked

    def _remove(self, start: int) -> int:
        size = self._size_at.pop(start)
        del self._start_of[start + size]
        del self._free[bisect_left(self._free, (size, start))]
        return size

    def _add(self, start: int, size: int) -> None:
        if not size:
            return
        before = self._start_of.get(start)
        if before is not None:
            size += self._remove(before)
            start = before
        if start + size in self._size_at:
            size += self._remove(start + size)
        if start + size == self.top:
            self.top = start
            return
        insort(self._free, (size, start))
        self._size_at[start], self._start_of[start + size] = size, start


def beyond(step: Sequence[Event], states: Sequence[int], *, settled: float, steps: int = 2) -> int:
    """Bytes that a heap holds at its highest over `steps` steps beyond those that live at theirs. `states`: sizes of
    the optimizer's tensors, made after the first step; what a step leaves is freed when the next begins."""
    heap, sizes, live, highest = Heap(settled=settled), dict[int, int](), 0, 0
    for number in range(steps):
        for block, size in step:
            if size:
                heap.take(block, size)
                sizes[block] = size
                live += size
                highest = max(highest, live)
            else:
                heap.give(block)
                live -= sizes.pop(block, 0)
        for block in list(sizes):
            heap.give(block)
            live -= sizes.pop(block)
        if number == 0:
            for order, size in enumerate(states):
                heap.take(-1 - order, size)
            live += sum(states)
    return max(0, heap.high - max(highest, live))
