"""Batches and units: nothing lost, nothing added but padding, and units that do not depend on the batching."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.core.errors import ThriftyError
from thrifty.data import collate, units

IDS = st.lists(st.integers(1, 99), min_size=1, max_size=7)
ROWS = st.lists(IDS, min_size=1, max_size=9)


def labelled(ids):
    return {"input_ids": ids, "labels": [-100, *ids[1:]]}


@settings(max_examples=50, deadline=None)
@given(rows=ROWS, multiple=st.none() | st.integers(1, 8), pad=st.integers(0, 3))
def test_collate_pads_on_the_right(rows, multiple, pad):
    batch = collate([labelled(ids) for ids in rows], pad_token_id=pad, pad_to_multiple_of=multiple)
    width = batch["input_ids"].shape[1]
    assert width % (multiple or 1) == 0
    assert max(map(len, rows)) <= width < max(map(len, rows)) + (multiple or 1)
    for i, ids in enumerate(rows):
        rest = width - len(ids)
        assert batch["input_ids"][i].tolist() == ids + [pad] * rest
        assert batch["attention_mask"][i].tolist() == [1] * len(ids) + [0] * rest
        assert batch["labels"][i].tolist() == [-100, *ids[1:]] + [-100] * rest
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def user_batches(rows, *, size, side, extra):
    """`rows` in batches of `size`, padded on `side`, `extra` columns wider than needed."""
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        width = max(map(len, chunk)) + extra
        batch = {"input_ids": [], "attention_mask": [], "labels": [], "position_ids": []}
        for ids in chunk:
            rest = width - len(ids)
            for name, values, padding in (
                ("input_ids", ids, 0),
                ("attention_mask", [1] * len(ids), 0),
                ("labels", [-100, *ids[1:]], -100),
                ("position_ids", list(range(len(ids))), 0),
            ):
                batch[name].append(values + [padding] * rest if side == "right" else [padding] * rest + values)
        made = {name: torch.tensor(values) for name, values in batch.items()}
        made["weight"] = torch.tensor([float(sum(ids)) for ids in chunk])
        made["grid"] = torch.tensor([[[sum(ids)] * 3] * 20 for ids in chunk])
        yield made


@settings(max_examples=60, deadline=None)
@given(
    rows=ROWS,
    size=st.integers(1, 9),
    side=st.sampled_from(["left", "right"]),
    extra=st.integers(0, 3),
    per_unit=st.integers(1, 5),
)
def test_units_do_not_depend_on_the_batching(rows, size, side, extra, per_unit):
    found = list(units(user_batches(rows, size=size, side=side, extra=extra), rows=per_unit))
    plain = list(units(user_batches(rows, size=1, side="right", extra=0), rows=per_unit))
    assert [len(unit["input_ids"]) for unit in found[:-1]] == [per_unit] * (len(found) - 1)
    assert len(found) == len(plain) == -(-len(rows) // per_unit)
    for one, other in zip(found, plain, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
    seen = [
        ids[mask.bool()].tolist()
        for unit in found
        for ids, mask in zip(unit["input_ids"], unit["attention_mask"], strict=True)
    ]
    assert seen == rows
    assert sum(int((unit["labels"] != -100).sum()) for unit in found) == sum(len(ids) - 1 for ids in rows)


@settings(max_examples=30, deadline=None)
@given(rows=ROWS, per_unit=st.integers(1, 5))
def test_units_undo_collate(rows, per_unit):
    batches = [collate([labelled(ids) for ids in rows], pad_token_id=5)]
    starts = range(0, len(rows), per_unit)
    wanted = [collate([labelled(ids) for ids in rows[i : i + per_unit]], pad_token_id=0) for i in starts]
    for unit, want in zip(units(batches, rows=per_unit), wanted, strict=True):
        assert all(torch.equal(unit[name], want[name]) for name in want)


def test_units_without_a_mask_and_with_class_labels():
    first = {"input_ids": torch.ones(1, 3, dtype=torch.int64), "labels": torch.tensor([1])}
    second = {"input_ids": torch.ones(3, 2, dtype=torch.int64), "labels": torch.tensor([0, 1, 0])}
    joined, rest = units([first, second], rows=2)
    assert joined["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert joined["labels"].tolist() == [1, 0]
    assert "attention_mask" not in rest
    assert rest["labels"].tolist() == [1, 0]
    several = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "labels": torch.ones(2, 3)}
    several["attention_mask"] = torch.tensor([[1, 1, 0], [1, 1, 1]])
    (unit,) = units([several])
    assert unit["labels"].tolist() == [[1.0, 1.0, 1.0]] * 2


def test_units_keep_a_hole_in_the_mask_and_rows_that_attend_nothing():
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]])
    (unit,) = units([{"input_ids": torch.tensor([[7, 1, 2, 3], [7, 7, 7, 7]]), "attention_mask": mask}])
    assert unit["attention_mask"].tolist() == [[1, 0, 1], [0, 0, 0]]
    assert unit["input_ids"][0].tolist() == [1, 2, 3]
    (alone,) = units([{"input_ids": torch.tensor([[7, 7]]), "attention_mask": torch.tensor([[0, 0]])}])
    assert alone["input_ids"].shape == (1, 1)


def test_units_are_lazy():
    def endless():
        while True:
            yield {"input_ids": torch.ones(3, 2, dtype=torch.int64)}

    assert next(units(endless(), rows=4))["input_ids"].shape == (4, 2)


IDS_2 = torch.ones(2, 3, dtype=torch.int64)
REFUSED = {
    "no batch": ([[IDS_2]], "must be a dict of tensors"),
    "a list": ([{"input_ids": IDS_2, "names": ["a", "b"]}], r"batch\['names'\] is list"),
    "a number": ([{"input_ids": IDS_2, "count": torch.tensor(3)}], r"batch\['count'\] is a single number"),
    "rows": ([{"input_ids": IDS_2, "labels": torch.ones(3)}], r"batch\['labels'\] has 3 rows, but 'input_ids' has 2"),
    "mask": ([{"input_ids": IDS_2, "attention_mask": torch.ones(2, 1, 3, 3)}], r"must be \[rows, columns\]"),
    "keys": ([{"input_ids": IDS_2}, {"input_ids": IDS_2, "labels": IDS_2}], "differ in labels"),
    "shapes": ([{"a": torch.ones(1, 2)}, {"a": torch.ones(1, 3)}], "rows of 'a' differ in shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_units_refuse_what_is_no_batch(case):
    batches, sentence = REFUSED[case]
    with pytest.raises(ThriftyError, match=sentence):
        list(units(batches))
    with pytest.raises(ThriftyError, match="at least 1"):
        list(units([], rows=0))
