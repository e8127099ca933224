"""The order of the rows: a function of seed, epoch, lengths and the global batch alone."""

from __future__ import annotations

import random

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from thrifty.run.order import RowOrder, batch_order, row_order

STRATEGIES = ("random", "sequential", "group_by_length")
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=90)


def padded(batches: list[list[int]], lengths: list[int]) -> float:
    """The share of padding where each batch is one micro-batch."""
    slots = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return 1 - sum(lengths) / slots


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 12), st.sampled_from(STRATEGIES), st.integers(0, 2**40), st.integers(0, 3))
def test_every_row_once_and_the_longest_first(
    lengths: list[int], batch: int, strategy: str, seed: int, epoch: int
) -> None:
    batches = batch_order(lengths, batch=batch, strategy=strategy, seed=seed, epoch=epoch)
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    assert all(len(rows) == batch for rows in batches[:-1])
    for rows in batches:
        assert [lengths[row] for row in rows] == sorted((lengths[row] for row in rows), reverse=True)
    if strategy == "sequential":
        assert [row for rows in batches for row in sorted(rows)] == list(range(len(lengths)))


@settings(max_examples=100, deadline=None)
@given(
    LENGTHS,
    st.sampled_from([(8, 1), (4, 2), (2, 4), (1, 8)]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(STRATEGIES),
    st.integers(0, 99),
)
def test_how_a_batch_is_split_changes_no_batch(
    lengths: list[int], split: tuple[int, int], processes: int, strategy: str, seed: int
) -> None:
    """Through torch's BatchSampler and accelerate's sharding, as the trainer's data loader does it."""
    batch = 8
    rows = split[0]
    if rows * processes > batch:
        return
    parts = batch // (rows * processes)
    want = batch_order(lengths, batch=batch, strategy=strategy, seed=seed, epoch=0)
    multiple = rows * processes if processes > 1 else 1
    order = RowOrder(lengths, batch=batch, strategy=strategy, seed=seed, multiple=multiple)
    micro_batches = BatchSampler(order, rows, drop_last=False)
    shards = [
        list(BatchSamplerShard(micro_batches, processes, index) if processes > 1 else micro_batches)
        for index in range(processes)
    ]
    assert len({len(shard) for shard in shards}) == 1
    found = []
    for start in range(0, len(shards[0]), parts):
        step = [row for shard in shards for micro in shard[start : start + parts] for row in micro]
        found.append(sorted(row for row in step if row < len(lengths)))
    assert found == [sorted(rows) for rows in want]


def test_group_by_length_pads_less() -> None:
    draw = random.Random(0)
    lengths = [draw.randrange(5, 200) for _ in range(3000)]
    shares = {s: padded(batch_order(lengths, batch=8, strategy=s, seed=1, epoch=0), lengths) for s in STRATEGIES}
    assert shares["random"] > 0.35
    assert shares["group_by_length"] < 0.05


def test_group_by_length_is_another_order_each_epoch_and_the_widest_opens_the_first() -> None:
    draw = random.Random(0)
    lengths = [draw.randrange(5, 200) for _ in range(120)]
    epochs = [batch_order(lengths, batch=4, strategy="group_by_length", seed=3, epoch=epoch) for epoch in range(3)]
    assert lengths[epochs[0][0][0]] == max(lengths)
    made = [{tuple(sorted(rows)) for rows in batches} for batches in epochs]
    assert len(made[0] & made[1]) < 5, "the same batches every epoch"
    widths = [lengths[rows[0]] for rows in epochs[1]]
    assert widths != sorted(widths, reverse=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_row_order(strategy: str) -> None:
    lengths = [1 + row % 7 for row in range(50)]
    order = RowOrder(lengths, batch=4, strategy=strategy, seed=3)
    first = list(order)
    assert len(order) == 50
    torch.manual_seed(9)
    assert list(RowOrder(lengths, batch=4, strategy=strategy, seed=3)) == first
    order.set_epoch(1)
    assert (list(order) == first) is (strategy == "sequential")
    assert (list(RowOrder(lengths, batch=4, strategy=strategy, seed=4)) == first) is (strategy == "sequential")


def test_the_probes_rows_depend_on_seed_and_epoch_alone() -> None:
    assert sorted(row_order(50, seed=3, epoch=0)) == list(range(50)) != row_order(50, seed=3, epoch=0)
    assert row_order(50, seed=3, epoch=0) not in (row_order(50, seed=3, epoch=1), row_order(50, seed=4, epoch=0))
