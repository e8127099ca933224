"""The Triton kernel against float64 products. Run with TRITON_INTERPRET=1 by `test_region_grad_triton.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

from thrifty.kernels import triton_region_grad
from thrifty.kernels.region_ways import OneProduct, StripGroup, choose
from thrifty.kernels.triton_region_grad import TritonBlocks, blocks_into, on_gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def bfloat16_dot() -> Any:
    """The interpreter keeps bfloat16 as its bits in uint16 and multiplies those (triton-lang/triton issue 11584): widen
    the operands of `tl.dot`, which is exact."""
    plain = interpreter.interpreter_builder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(a: Any, b: Any, *rest: Any) -> Any:
        return plain(widened(a), widened(b), *rest)

    interpreter.interpreter_builder.create_dot = create_dot
    yield
    interpreter.interpreter_builder.create_dot = plain


def check(dy: Tensor, x: Tensor, rows: list[int], slots: list[int], h: int, w: int, out_dtype: torch.dtype) -> None:
    out = torch.full((len(rows), h, w), float("nan"), dtype=out_dtype)
    table = (torch.tensor(starts, dtype=torch.int32) for starts in (rows, slots))
    blocks_into(dy, x, *table, out)
    exact, size = dy.double().t() @ x.double(), dy.double().abs().t() @ x.double().abs()
    for k, (row, slot) in enumerate(zip(rows, slots, strict=True)):
        at = slice(row, row + h), slice(slot, slot + w)
        # float32 accumulation, then one rounding to the result's dtype
        bound = 16 * torch.finfo(torch.float32).eps * size[at] + torch.finfo(out_dtype).eps * exact[at].abs() + 1e-6
        assert bool(((out[k].double() - exact[at]).abs() <= bound).all())


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int, list[int], list[int], int, int]:
    """Tokens, O, U, starts and the block's size: ragged against tiles of 16 to 64, columns and rows too."""
    h, w = (draw(st.sampled_from([1, 2, 5, 16, 17, 33, 64, 70])) for _ in range(2))
    outputs, columns = h + draw(st.integers(0, 40)), w + draw(st.integers(0, 40))
    n = draw(st.integers(0, 4))
    rows = draw(st.lists(st.integers(0, outputs - h), min_size=n, max_size=n))
    slots = draw(st.lists(st.integers(0, columns - w), min_size=n, max_size=n))
    return draw(st.sampled_from([0, 1, 2, 31, 32, 33, 70])), outputs, columns, rows, slots, h, w


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_any_shape(case: Any, dtype: torch.dtype, strided_dy: bool, strided_x: bool, seed: int) -> None:
    tokens, outputs, columns, rows, slots, h, w = case
    generator = torch.Generator().manual_seed(seed)

    def matrix(width: int, strided: bool) -> Tensor:
        """Strided: token index innermost, every second one, as nothing contiguous would be."""
        if strided:
            return torch.randn(width, 2 * tokens, generator=generator).to(dtype)[:, ::2].t()
        return torch.randn(tokens, width, generator=generator).to(dtype)

    check(matrix(outputs, strided_dy), matrix(columns, strided_x), rows, slots, h, w, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [511, 512, 1000])
def test_tokens_are_split_and_summed(dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dy, x = torch.randn(tokens, 40).to(dtype), torch.randn(tokens, 30).to(dtype)
    made: list[tuple[int, ...]] = []
    launch = triton_region_grad._kernel

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            made.append(grid)
            return launch[grid]

    monkeypatch.setattr(triton_region_grad, "_kernel", Recorded())
    check(dy, x, [0, 7], [2, 11], 33, 17, dtype)
    assert made == [(2 * 1, tokens // 256)]


def test_a_float32_result_of_low_precision_inputs() -> None:
    check(torch.randn(600, 40).bfloat16(), torch.randn(600, 40).bfloat16(), [0], [8], 40, 32, torch.float32)


def test_twice_gives_the_same_bits() -> None:
    dy, x = torch.randn(1000, 40), torch.randn(1000, 30)
    found = []
    for _ in range(2):
        found.append(torch.empty(1, 40, 30))
        blocks_into(dy, x, torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), found[-1])
    assert torch.equal(*found)


def test_whole_columns_stay_one_product_and_float64_goes_the_plain_way() -> None:
    columns = StripGroup(h=40, w=1, rows=(0, 0, 0), slots=(0, 1, 2), offset=0)
    assert isinstance(on_gpu(columns, choose(columns)), OneProduct)
    group = StripGroup(h=16, w=16, rows=(0, 16, 32), slots=(16, 0, 32), offset=0)
    way = on_gpu(group, choose(group))
    assert isinstance(way, TritonBlocks)
    dy, x = torch.randn(9, 48, dtype=torch.float64), torch.randn(9, 48, dtype=torch.float64)
    out, twin = torch.empty(3, 16, 16, dtype=torch.float64), torch.empty(3, 16, 16, dtype=torch.float64)
    way.to(torch.device("cpu")).into(dy, x, out)
    choose(group).into(dy, x, twin)
    assert torch.equal(out, twin)
