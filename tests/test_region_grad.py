"""The region's gradient: the fast form, its plain twin, and float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from thrifty.core.region import Blocks
from thrifty.kernels.region_grad import Layout, StripGroup, region_grad, region_grad_dense


def layout_of(region: Blocks, shape: tuple[int, int]) -> Layout:
    """The blocks over a strip of all columns."""
    return Layout(
        StripGroup(h=g.h, w=g.w, rows=tuple(g.rows.tolist()), slots=tuple(g.cols.tolist()), offset=g.offset)
        for g in region.groups(shape)
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Blocks, tuple[int, int], int]:
    """Blocks in a matrix, and a number of tokens; sizes on both sides of where the form changes."""
    out, columns = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    h = draw(st.sampled_from([1, 2, 5, 16, 31, 32, 33, out]))
    w = draw(st.sampled_from([1, 2, 5, 16, 31, 32, 33, columns]))
    every = st.tuples(st.integers(0, -(-out // h) - 1), st.integers(0, -(-columns // w) - 1))
    index = draw(st.lists(every, min_size=1, max_size=9, unique=True))
    return Blocks((h, w), torch.tensor(index)), (out, columns), draw(st.sampled_from([0, 1, 3, 17]))


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_the_blocks_of_the_dense_product(case: tuple[Blocks, tuple[int, int], int], dtype: torch.dtype) -> None:
    region, (out, columns), tokens = case
    generator = torch.Generator().manual_seed(out * 100 + columns)
    dy = torch.randn(tokens, out, generator=generator, dtype=torch.float64).to(dtype)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64).to(dtype)
    layout = layout_of(region, (out, columns))
    leaf_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    fast = region_grad(dy, x, layout, dtype=leaf_dtype)
    twin = region_grad_dense(dy, x, layout, dtype=leaf_dtype)
    exact = region.gather(dy.double().t() @ x.double()).flatten()
    assert fast.dtype == twin.dtype == leaf_dtype
    assert fast.shape == twin.shape == exact.shape
    scale = float(dy.double().abs().t().matmul(x.double().abs()).max()) if tokens else 1.0
    for found in (fast, twin):
        assert float((found.double() - exact).abs().max()) <= 4 * torch.finfo(dtype).eps * scale


def test_strided_inputs() -> None:
    region, shape = Blocks((3, 5), torch.tensor([[0, 0], [1, 1], [2, 0]])), (8, 9)
    dy, x = torch.randn(8, 6).t(), torch.randn(6, 18)[:, ::2]
    expected = region.gather(dy.t() @ x).flatten()
    for form in (region_grad, region_grad_dense):
        torch.testing.assert_close(form(dy, x, layout_of(region, shape), dtype=torch.float32), expected)


def test_no_group_gives_nothing() -> None:
    for form in (region_grad, region_grad_dense):
        assert form(torch.ones(3, 2), torch.ones(3, 2), Layout(()), dtype=torch.float32).shape == (0,)


class Largest(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.untyped_storage().nbytes() // out.itemsize)
        return out


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (1, 256), (256, 1), (4, 8)])
def test_the_dense_product_is_never_made(size: tuple[int, int]) -> None:
    region, shape = Blocks(size, torch.tensor([[0, 0]])), (256, 256)
    dy, x = torch.randn(20, 256), torch.randn(20, 256)
    layout = layout_of(region, shape)
    with Largest() as fast:
        region_grad(dy, x, layout, dtype=torch.float32)
    with Largest() as twin:
        region_grad_dense(dy, x, layout, dtype=torch.float32)
    assert twin.numbers == 256 * 256  # the mode sees what it should
    assert fast.numbers <= 20 * 256
