"""Sums, averages, stacks and transfers of deltas against plain arithmetic on the tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from delta_cases import KINDS, bits, deltas, model, moved, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thrifty.core.entries import Entries
from thrifty.core.errors import ThriftyError
from thrifty.core.low_rank import LowRank
from thrifty.core.region import Blocks, Whole
from thrifty.delta import Delta, LowRankPiece
from thrifty.delta.algebra import average, combine, model_stock, stack, transfer

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
TWO = DTYPES.flatmap(lambda dtype: st.tuples(st.just(dtype), deltas(dtype), deltas(dtype)))


def changed(delta: Delta, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """What `delta` adds to each tensor, float64."""
    base = model(dtype, seed)
    before = tensors(base)
    delta.apply(base)
    return {name: p.detach().double() - before[name].double() for name, p in base.named_parameters()}


def check(result: Delta, terms: list[tuple[dict[str, Tensor], float]], dtype: torch.dtype) -> None:
    """`result` adds the weighted sum of changes, each of which was rounded once when it was measured, and is removed
    exactly."""
    base = model(dtype)
    start, before = bits(base), tensors(base)
    result.apply(base)
    for name, p in base.named_parameters():
        start_values = before[name].double()
        want = start_values + sum(weight * change[name] for change, weight in terms)
        size = want.abs() + sum(abs(weight) * (start_values + change[name]).abs() for change, weight in terms)
        # low-rank factors are rounded to float32 on the way
        factors = sum(abs(weight) * float(change[name].abs().max()) for change, weight in terms)
        bound = torch.finfo(dtype).eps * size + 2e-5 * factors + torch.finfo(dtype).tiny
        assert bool(((p.detach().double() - want).abs() <= bound).all()), name
    if bits(base) != start:  # else there is nothing to remove, which is said
        result.remove(base)
    assert bits(base) == start


@settings(max_examples=80, deadline=None)
@given(TWO, st.floats(-2, 2), st.floats(-2, 2))
def test_sums_are_those_of_the_changes(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[torch.dtype, Delta, Delta], a: float, b: float
) -> None:
    dtype, one, other = case
    base = tensors(model(dtype))
    first, second = changed(one, dtype), changed(other, dtype)
    for weights in ((1.0, 1.0), (a, b)):
        terms = [(first, weights[0]), (second, weights[1])]
        result = combine([(one, weights[0]), (other, weights[1])], base=base)
        check(result, terms, dtype)
        result.save(folder := tmp_path_factory.mktemp("sum") / "d")
        check(Delta.load(folder), terms, dtype)


@settings(max_examples=60, deadline=None)
@given(DTYPES.flatmap(lambda dtype: st.tuples(st.just(dtype), deltas(dtype))))
def test_one_times_a_delta_is_that_delta_bit_for_bit(case: tuple[torch.dtype, Delta]) -> None:
    dtype, delta = case
    one, other = model(dtype), model(dtype)
    delta.apply(one)
    combine([(delta, 1.0)]).apply(other)
    assert bits(one) == bits(other)
    nothing = model(dtype)
    combine([(delta, 0.0)], base=tensors(nothing)).apply(nothing)
    assert all(torch.equal(p, q) for p, q in zip(nothing.parameters(), model(dtype).parameters(), strict=True))


@settings(max_examples=60, deadline=None)
@given(DTYPES, st.data())
def test_a_stack_does_what_both_do_one_after_the_other(dtype: torch.dtype, data: st.DataObject) -> None:
    first = data.draw(deltas(dtype))
    middle, untouched = model(dtype), tensors(model(dtype))
    first.apply(middle)
    regions = dict(data.draw(deltas(dtype)).plan)
    second = moved(tensors(middle), regions, seed=3)
    second.apply(middle)
    both, start = model(dtype), bits(model(dtype))
    result = stack(first, second, base=untouched)
    result.apply(both)
    assert bits(both) == bits(middle)
    if bits(both) != start:
        result.remove(both)
    assert bits(both) == start


def test_a_stack_refuses_a_delta_that_starts_elsewhere() -> None:
    base = tensors(model())
    first = moved(base, {"matrix": Blocks((3, 3), torch.tensor([[0, 0]]))}, seed=1)
    beside = moved(base, {"matrix": Entries(torch.tensor([0, 1]))}, seed=2)
    with pytest.raises(ThriftyError, match="matrix: the second delta does not start where the first one ends"):
        stack(first, beside).apply(model())
    pair = moved(base, {"matrix": LowRank(1, 1.0)}, seed=2)
    with pytest.raises(ThriftyError, match="matrix: the second delta does not start where the first one ends"):
        stack(first, pair, base=base).apply(model())


@settings(max_examples=40, deadline=None)
@given(DTYPES.flatmap(lambda dtype: st.tuples(st.just(dtype), deltas(dtype))))
def test_transfer_makes_the_same_change_to_another_base(case: tuple[torch.dtype, Delta]) -> None:
    dtype, delta = case
    change, newer = changed(delta, dtype), model(dtype, seed=5)
    before, start = tensors(newer), bits(newer)
    there = transfer(delta, before)
    there.apply(newer)
    for name, p in newer.named_parameters():
        want = before[name].double() + change[name]
        size = want.abs() + before[name].double().abs() + tensors(model(dtype))[name].double().abs()
        bound = 2 * torch.finfo(dtype).eps * size + 2e-5 * float(change[name].abs().max())
        assert bool(((p.detach().double() - want).abs() <= bound).all()), name
    if bits(newer) != start:  # else there is nothing to remove, which is said
        there.remove(newer)
    assert bits(newer) == start


def test_model_stock_draws_towards_the_base_by_the_angle() -> None:
    base = tensors(model())
    one, other = (moved(base, {"matrix": Whole(), "vector": Whole()}, seed=n) for n in (1, 2))
    a, b = changed(one, torch.float32), changed(other, torch.float32)
    found = changed(model_stock(one, other), torch.float32)
    for name in ("matrix", "vector"):
        cosine = float((a[name] * b[name]).sum() / (a[name].norm() * b[name].norm()))
        t = 2 * cosine / (1 + cosine) if cosine > 0 else 0.0
        torch.testing.assert_close(found[name], t * (a[name] + b[name]) / 2, rtol=1e-4, atol=1e-3)
    same = changed(model_stock(one, one), torch.float32)  # no angle: the mean of both
    torch.testing.assert_close(same["matrix"], a["matrix"], rtol=1e-6, atol=1e-3)


def test_low_rank_pairs_stay_pairs_and_need_the_base() -> None:
    base = tensors(model())
    one, other = (moved(base, {"matrix": LowRank(2, 4.0)}, seed=n) for n in (1, 2))
    piece = combine([(one, 0.5), (other, 2.0)], base=base).pieces["matrix"]
    assert isinstance(piece, LowRankPiece)
    assert piece.region.r == 4
    assert isinstance(average([one] * 4, base=base).plan["matrix"], Whole)  # rank 8 of a 9 x 7 matrix is no saving
    with pytest.raises(ThriftyError, match="needs the base: give the base model"):
        combine([(one, 0.5)]).apply(model())


@pytest.mark.parametrize("kind", KINDS)
def test_deltas_of_two_bases_are_refused(kind: str) -> None:
    regions = {"matrix": LowRank(1, 1.0) if kind == "low_rank" else Blocks((2, 2), torch.tensor([[0, 0]]))}
    one, other = moved(tensors(model()), regions, seed=1), moved(tensors(model(seed=1)), regions, seed=1)
    with pytest.raises(ThriftyError, match="matrix differs in the bases of these deltas"):
        combine([(one, 1.0), (other, 1.0)], base=tensors(model())).apply(model())
    half = moved(tensors(model(torch.bfloat16)), regions, seed=1)
    with pytest.raises(ThriftyError, match="matrix differs in the bases of these deltas"):
        average([one, half], base=tensors(model())).apply(model())
    with pytest.raises(ThriftyError, match="3 weights for 1 deltas"):
        average([one], weights=[1, 2, 3])


def test_a_result_is_made_tensor_by_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tensors(model())
    one = moved(base, dict.fromkeys(("matrix", "experts", "vector"), Whole()), seed=1)
    one.save(tmp_path / "one")
    loaded, read = Delta.load(tmp_path / "one"), []
    make = loaded.pieces._make  # type: ignore[attr-defined]
    monkeypatch.setattr(loaded.pieces, "_make", lambda name: read.append(name) or make(name))
    result = combine([(loaded, 0.5)])
    assert read == []
    result.pieces["experts"]
    assert read == ["experts"]
