"""The order in which training meets the rows: a function of seed, epoch, row lengths and the global batch alone.

A global batch is what one optimizer step sees: per_device_train_batch_size x gradient_accumulation_steps x processes
rows. How it is split into micro-batches and processes changes no batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers import TrainingArguments

__all__ = ["RowOrder", "batch_order", "row_order", "rows_of_step"]

_POOL = 50  # global batches whose rows are sorted together, as in transformers' LengthGroupedSampler
_POOLS = 4  # at least so many pools of a small data set: one alone would give the same batches in every epoch


def row_order(rows: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of `range(rows)`. Neither the batch's split nor any other use of randomness changes it."""
    return _permutation(rows, _generator(seed, epoch))


def batch_order(lengths: Sequence[int], *, batch: int, strategy: str, seed: int, epoch: int) -> list[list[int]]:
    """The global batches of one epoch: row numbers, `batch` to each but the last, longest row first.

    Rows are sorted inside a batch whatever the strategy: the loss of a step is a sum over its labels, so this changes
    padding and no step, and what does not fit into memory fails in the step's first part.

    Args:
        lengths: tokens of each row.
        batch: rows of one optimizer step.
        strategy: `random`; `sequential`, the order of the rows; `group_by_length`: rows are shuffled, each pool of at
            most 50 batches is sorted by length and cut, and the batches are shuffled. Little is padded; the cost is
            that a batch holds rows of one length, so steps differ more from each other than under `random`. The widest
            batch opens the first epoch.
        seed: of the shuffling.
        epoch: counted from 0; another order for each.
    """
    assert batch > 0, batch
    generator = _generator(seed, epoch)
    order = list(range(len(lengths))) if strategy == "sequential" else _permutation(len(lengths), generator)
    full = len(order) - len(order) % batch
    if strategy == "group_by_length" and full:
        pool = batch * min(_POOL, max(1, full // (batch * _POOLS)))
        for start in range(0, full, pool):
            end = min(start + pool, full)
            order[start:end] = sorted(order[start:end], key=lambda row: -lengths[row])
        batches = [order[start : start + batch] for start in range(0, full, batch)]
        batches = [batches[number] for number in _permutation(len(batches), generator)]
        if epoch == 0:
            widths = [(max(lengths[row] for row in rows), sum(lengths[row] for row in rows)) for rows in batches]
            batches.insert(0, batches.pop(widths.index(max(widths))))
        order[:full] = [row for rows in batches for row in rows]
    return [
        sorted(order[start : start + batch], key=lambda row: -lengths[row]) for start in range(0, len(order), batch)
    ]


class RowOrder(Sampler[int]):
    """`batch_order` of the epoch last given to `set_epoch`, row by row.

    Args:
        lengths: tokens of each row.
        batch: rows of one optimizer step, over all processes.
        strategy: see `batch_order`.
        seed: see `batch_order`.
        multiple: the last batch is filled up to a multiple of this with the number `len(lengths)`, which stands for a
            row without labels; otherwise accelerate would train the epoch's first rows twice where processes share.
    """

    def __init__(self, lengths: Sequence[int], *, batch: int, strategy: str, seed: int, multiple: int = 1) -> None:
        self.lengths = lengths
        self.batch = batch
        self.strategy = strategy
        self.seed = seed
        self.epoch = 0
        self.fillers = -len(lengths) % multiple

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = batch_order(self.lengths, batch=self.batch, strategy=self.strategy, seed=self.seed, epoch=self.epoch)
        for rows in order:
            yield from rows
        yield from [len(self.lengths)] * self.fillers

    def __len__(self) -> int:
        return len(self.lengths) + self.fillers


def rows_of_step(
    order: RowOrder, *, args: TrainingArguments, step: int, parts: Sequence[tuple[int, int]] | None
) -> list[int]:
    """The row numbers of optimizer step `step` (from 0), which lies in the epoch that `order` is set to.

    `parts`: only of these (micro-batch, process); None: all. Fillers are left out.
    """
    rows, size = list(order), args.per_device_train_batch_size
    pieces, processes = args.gradient_accumulation_steps, args.world_size
    batches = len(rows) / (size * processes)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    first = step % max(1, math.ceil(batches / pieces)) * order.batch
    wanted = parts or [(piece, process) for piece in range(pieces) for process in range(processes)]
    starts = [first + (piece * processes + process) * size for piece, process in wanted]
    return [row for start in starts for row in rows[start : start + size] if row < len(order.lengths)]


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)


def _permutation(count: int, generator: torch.Generator) -> list[int]:
    return torch.randperm(count, generator=generator).tolist()
