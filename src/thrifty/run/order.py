"""The order in which training meets the rows: a function of the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

__all__ = ["RowOrder", "row_order"]


def row_order(rows: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of `range(rows)`. Neither the batch's split nor any other use of randomness changes it."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(rows, generator=generator).tolist()


class RowOrder(Sampler[int]):
    """`row_order` of the epoch last given to `set_epoch`."""

    def __init__(self, rows: int, *, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(row_order(self.rows, seed=self.seed, epoch=self.epoch))

    def __len__(self) -> int:
        return self.rows
