"""Rows into packs, and packs into batches."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import find_packed_sequence_indices

from thrifty.data import PackedRows, collate, pack

LENGTHS = st.lists(st.integers(1, 30), max_size=60)


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Tokens of each pack, by looking at every pack for every row."""
    sums: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, used in enumerate(sums) if used + length <= capacity]
        if fitting:
            sums[max(fitting, key=lambda number: sums[number])] += length
        else:
            sums.append(length)
    return sums


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(30, 90), st.integers(0, 5))
def test_packs_are_those_of_plain_best_fit(lengths: list[int], capacity: int, seed: int) -> None:
    packs = pack(lengths, capacity=capacity, seed=seed)
    assert sorted(row for packed in packs for row in packed) == list(range(len(lengths)))
    sums = [sum(lengths[row] for row in packed) for packed in packs]
    assert max(sums, default=0) <= capacity
    assert sorted(sums) == sorted(plain_best_fit(lengths, capacity))
    assert packs == pack(lengths, capacity=capacity, seed=seed)


def test_the_seed_decides_between_rows_of_one_length() -> None:
    lengths = [10] * 20
    assert pack(lengths, capacity=40, seed=1) != pack(lengths, capacity=40, seed=2)
    with pytest.raises(AssertionError, match="longer than a pack"):
        pack([5], capacity=4, seed=0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=25), st.integers(12, 40), st.sampled_from([None, 8]))
def test_a_packed_batch_holds_the_rows_and_transformers_sees_their_borders(
    lengths: list[int], capacity: int, multiple: int | None
) -> None:
    rows = [{"input_ids": [i + 1] * n, "labels": [i + 1] * n} for i, n in enumerate(lengths)]
    packed = PackedRows(rows, pack(lengths, capacity=capacity, seed=0))
    assert packed.lengths == [len(row["input_ids"]) for row in packed]
    batch = collate(list(packed), pad_token_id=0, pad_to_multiple_of=multiple)
    assert batch.keys() == {"input_ids", "labels", "position_ids", "tokens"}
    assert batch["tokens"].tolist() == packed.lengths
    ids, labels, positions = batch["input_ids"], batch["labels"], batch["position_ids"]
    assert int((ids != 0).sum()) == sum(lengths)
    starts = positions == 0
    assert labels[starts].eq(-100).all(), "the token before it is another row's"
    assert torch.equal(labels[~starts & (ids != 0)], ids[~starts & (ids != 0)])
    assert labels[ids == 0].eq(-100).all()
    parts = find_packed_sequence_indices(positions)
    parts = torch.zeros_like(ids) if parts is None else parts
    same_part = parts[:, :, None] == parts[:, None, :]
    same_row = ids[:, :, None] == ids[:, None, :]  # every row has a token of its own, padding 0
    assert torch.equal(same_part, same_row)


def test_packed_rows_can_be_sent_to_a_loaders_processes() -> None:
    rows = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3], "labels": [-100]}]
    packed = pickle.loads(pickle.dumps(PackedRows(rows, [[1, 0]])))  # noqa: S301
    assert packed[0] == {"input_ids": [3, 1, 2], "labels": [-100, -100, 2], "position_ids": [0, 0, 1]}
