"""The allocations of a model of any depth, from those of one with three layers alike: lowest, middle, top."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from .heap import Event
from .ledger import Segment

__all__ = ["Allocation", "unroll"]

Allocation = tuple[Segment, int, int]  # where it happens, the block's number, its bytes (0: freed)
_Home = tuple[str, int, int]  # a block: segment's name, layer, how many were made there before it
_LAYERED = ("forward", "backward")


def unroll(events: Sequence[Allocation], depth: int) -> list[Event]:
    """Events of a step with `depth` layers; the three are those of a traced step, in order."""
    homes: dict[int, _Home] = {}
    made: defaultdict[Segment, int] = defaultdict(int)
    parts: list[tuple[Segment, list[tuple[_Home, int]]]] = []
    for segment, block, size in events:
        if size and block not in homes:
            homes[block] = (*segment, made[segment])
            made[segment] += 1
        if not parts or parts[-1][0] != segment:
            parts.append((segment, []))
        parts[-1][1].append((homes[block], size))
    return _numbered(parts, depth)


def _numbered(parts: Sequence[tuple[Segment, list[tuple[_Home, int]]]], depth: int) -> list[Event]:
    numbers: dict[_Home, int] = {}
    found: list[Event] = []
    for (name, layer), changes in parts:
        for real in _copies(name, layer, depth):
            for home, size in changes:
                for block in _blocks(home, name, layer, real, depth):
                    number = numbers.setdefault(block, len(numbers))
                    found.append((number, size))
    return found


def _copies(name: str, layer: int, depth: int) -> list[int]:
    """Which layers the traced one stands for, in the order in which they run."""
    if name not in _LAYERED:
        return [0]
    middle = list(range(1, depth - 1))
    return {0: [0], 1: middle if name == "forward" else middle[::-1], 2: [depth - 1]}[layer]


def _blocks(home: _Home, name: str, layer: int, real: int, depth: int) -> list[_Home]:
    """The blocks that `home` means where the traced `layer` is `real`; several where a part outside the layers frees
    those of all middle layers."""
    kind, of, order = home
    if kind not in _LAYERED:
        return [home]
    if name in _LAYERED:
        return [(kind, real + of - layer, order)]
    return [(kind, number, order) for number in _copies(kind, of, depth)]
