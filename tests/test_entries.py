"""Entries: the region against a boolean mask, and its gradient against the dense product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.core.entries import Entries
from thrifty.core.errors import ThriftyError
from thrifty.core.plan import Plan, plan_from_files, plan_to_files
from thrifty.kernels import entry_grad
from thrifty.kernels.entry_grad import EntryLayout, entry_grad_dense

SHAPES = st.sampled_from([(7,), (5, 6), (1, 1), (3, 4, 5), (2, 9)])


@settings(max_examples=80, deadline=None)
@given(SHAPES, st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_region_agrees_with_a_mask(shape: tuple[int, ...], data: st.DataObject, dtype: torch.dtype) -> None:
    total = torch.Size(shape).numel()
    index = data.draw(st.lists(st.integers(0, total - 1), min_size=1, unique=True))
    region, mask = Entries(torch.tensor(index)), torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[index] = True
    tensor = torch.randn(shape).to(dtype)
    before = tensor.clone()
    assert torch.equal(region.mask(shape), mask)
    assert region.size(shape) == len(index) == region.gather(tensor).numel()
    assert torch.equal(region.gather(tensor), tensor[mask])
    region.scatter_(tensor, torch.zeros(len(index)))
    assert torch.equal(tensor[~mask], before[~mask])
    assert not tensor[mask].any()
    plan = Plan({"w": region}, shapes={"w": shape}, total=total)
    assert plan_from_files(*plan_to_files(plan))["w"] == region


@pytest.mark.parametrize(
    ("index", "words"),
    [([[0, 1]], "must be"), ([3, 3], "twice"), ([-1], "outside"), ([30], "outside"), ([], "no entry")],
)
def test_what_cannot_be_is_refused(index: list, words: str) -> None:
    with pytest.raises(ThriftyError, match=words):
        Plan({"w": Entries(torch.tensor(index, dtype=torch.int64))}, shapes={"w": (5, 6)}, total=30)


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(st.integers(0, 9), st.integers(1, 12), st.integers(1, 12)),
    st.data(),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.sampled_from([0, 3, 10**9]),
    st.sampled_from([1, 7, 2**20]),
)
def test_gradient_agrees_with_the_dense_product(
    sizes: tuple[int, int, int], data: st.DataObject, dtype: torch.dtype, cost: int, chunk: int
) -> None:
    tokens, out, columns = sizes
    index = data.draw(st.lists(st.integers(0, out * columns - 1), min_size=1, unique=True).map(sorted))
    flat = torch.tensor(index)
    dy = torch.randn(tokens, 2 * out).to(dtype)[:, ::2]  # not contiguous
    x = torch.randn(columns, tokens).to(dtype).t()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry_grad, "_SAMPLE_COST", cost)
        patch.setattr(entry_grad, "_CHUNK", chunk)
        layout = EntryLayout(flat // columns, flat % columns)
        got = layout.grad(dy, x, dtype=torch.promote_types(dtype, torch.float32))
    used = len((flat // columns).unique()) * len((flat % columns).unique())
    assert layout.sampled == (cost * len(index) < used)
    want = entry_grad_dense(dy.double(), x.double(), layout, dtype=torch.float64)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
