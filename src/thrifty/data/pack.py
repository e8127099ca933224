"""Several rows in one: less padding, and nearly as many tokens in every batch."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence

from thrifty.data.encode import IGNORED

__all__ = ["PackedRows", "pack"]


def pack(lengths: Sequence[int], *, capacity: int, seed: int) -> list[list[int]]:
    """Rows of `lengths` tokens into packs of at most `capacity`: best fit, the longest first. Row numbers of each pack.

    Each row goes to the fullest pack that still has room. Which of several rows of one length goes where depends on
    `seed`. O(rows x log(capacity)).
    """
    assert max(lengths, default=0) <= capacity, "a row is longer than a pack"
    order = list(range(len(lengths)))
    random.Random(f"thrifty pack {seed}").shuffle(order)
    order.sort(key=lambda row: -lengths[row])
    packs: list[list[int]] = []
    by_room: dict[int, list[list[int]]] = {}
    rooms: list[int] = []  # the keys of `by_room`, rising
    for row in order:
        at = bisect_left(rooms, lengths[row])
        if at == len(rooms):
            chosen, room = [], capacity
            packs.append(chosen)
        else:
            room = rooms[at]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        chosen.append(row)
        room -= lengths[row]
        if room not in by_room:
            insort(rooms, room)
        by_room.setdefault(room, []).append(chosen)
    return packs


class PackedRows(Sequence[dict[str, list[int]]]):
    """Rows one after another as one row: `input_ids`, `labels`, and `position_ids` that start at 0 in each.

    The first label of each is -100: the token before it belongs to another row. They are joined when they are asked
    for, so that the data are held once.
    """

    def __init__(self, rows: Sequence[Mapping[str, Sequence[int]]], packs: Sequence[Sequence[int]]) -> None:
        self.rows = rows
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, list[int]]:  # type: ignore[override]
        joined: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for row in (self.rows[number] for number in self.packs[index]):
            joined["input_ids"] += row["input_ids"]
            joined["labels"] += [IGNORED, *row["labels"][1:]]
            joined["position_ids"] += range(len(row["input_ids"]))
        return joined

    @property
    def lengths(self) -> list[int]:
        """Tokens of each pack."""
        return [sum(len(self.rows[number]["input_ids"]) for number in packed) for packed in self.packs]
