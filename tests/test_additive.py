"""The additive form against the dense matrix that it never makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from thrifty.core.region import Blocks
from thrifty.update.additive import Additive

Case = tuple[Blocks, tuple[int, int], bool]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Blocks in a stored matrix, few and many of a line, and which way it is stored."""
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    h = draw(st.sampled_from([1, 2, 5, 16, rows]))
    w = draw(st.sampled_from([1, 2, 5, 16, columns]))
    every = st.tuples(st.integers(0, -(-rows // h) - 1), st.integers(0, -(-columns // w) - 1))
    index = draw(st.lists(every, min_size=1, max_size=12, unique=True))
    return Blocks((h, w), torch.tensor(index)), (rows, columns), draw(st.booleans())


def dense(region: Blocks, shape: tuple[int, int], packed: Tensor) -> Tensor:
    out = torch.zeros(shape, dtype=packed.dtype)
    region.scatter_(out, packed)
    return out


def draw_inputs(case: Case, *lead: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x `[*lead, I]`, packed values, dz `[*lead, O]`."""
    region, shape, transposed = case
    inputs, outputs = shape if transposed else shape[::-1]
    generator = torch.Generator().manual_seed(shape[0] * 100 + shape[1])

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    return normal(*lead, inputs), normal(*region.packed_shape(shape)), normal(*lead, outputs)


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_output_and_gradients_are_the_dense_ones(case: Case, dtype: torch.dtype) -> None:
    region, shape, transposed = case
    x, packed, dz = (t.requires_grad_() for t in draw_inputs(case, 2, 3, dtype=dtype))
    z = Additive(region, shape, transposed=transposed)(x, packed, dtype=dtype)
    assert z.dtype == dtype
    dx, d_packed = torch.autograd.grad(z, (x, packed), dz.detach())
    assert d_packed.dtype == packed.dtype

    x64, packed64, dz64 = (t.detach().double() for t in (x, packed, dz))
    weight = dense(region, shape, packed64)
    weight_OI = weight.t() if transposed else weight
    exact = F.linear(x64, weight_OI)
    d_weight = dz64.flatten(0, 1).t() @ x64.flatten(0, 1)
    exact_d = region.gather(d_weight.t() if transposed else d_weight)
    tolerance = 8 * torch.finfo(dtype).eps
    for found, expected, size in (
        (z, exact, F.linear(x64.abs(), weight_OI.abs())),
        (dx, dz64 @ weight_OI, dz64.abs() @ weight_OI.abs()),
        (d_packed, exact_d, dz64.abs().flatten(0, 1).t() @ x64.abs().flatten(0, 1)),
    ):
        assert found.shape == expected.shape
        assert float((found.detach().double() - expected).abs().max()) <= tolerance * (float(size.max()) + 1)


@pytest.mark.parametrize("transposed", [False, True])
def test_second_inputs_of_any_strides_and_a_frozen_leaf(transposed: bool) -> None:
    case = Blocks((3, 5), torch.tensor([[0, 0], [1, 1], [2, 0]])), (8, 9), transposed
    region, shape, _ = case
    x, packed, _ = draw_inputs(case, 6, dtype=torch.float32)
    strided = x.repeat_interleave(2, dim=1)[:, ::2].requires_grad_()
    z = Additive(region, shape, transposed=transposed)(strided, packed, dtype=torch.float32)
    weight = dense(region, shape, packed)
    weight_OI = weight.t() if transposed else weight
    torch.testing.assert_close(z, F.linear(x, weight_OI))
    z.sum().backward()  # an expanded gradient
    torch.testing.assert_close(strided.grad, weight_OI.sum(0).expand_as(x))


def test_half_precision_products_and_a_float32_leaf() -> None:
    region, shape = Blocks((4, 4), torch.tensor([[0, 1], [2, 2]])), (12, 12)
    x, packed, _ = draw_inputs((region, shape, False), 5, dtype=torch.float32)
    packed.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        z = Additive(region, shape, transposed=False)(x, packed, dtype=torch.bfloat16)
    assert z.dtype == torch.bfloat16
    z.float().sum().backward()
    assert packed.grad is not None
    assert packed.grad.dtype == torch.float32


class Largest(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out: Any = func(*args, **(kwargs or {}))  # type: ignore[operator]
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.untyped_storage().nbytes() // out.itemsize)
        return out


@pytest.mark.parametrize("size", [(16, 16), (1, 256), (256, 1), (4, 8)])
@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_of_the_matrix_s_size_is_made_and_the_used_columns_are_kept(
    size: tuple[int, int], transposed: bool
) -> None:
    region, shape = Blocks(size, torch.tensor([[0, 0]])), (256, 256)
    x, packed, _ = draw_inputs((region, shape, transposed), 20, dtype=torch.float32)
    x.requires_grad_()
    packed.requires_grad_()
    additive = Additive(region, shape, transposed=transposed)
    kept: list[Tensor] = []
    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            z = additive(x, packed, dtype=torch.float32)
        z.sum().backward()
    assert largest.numbers == 20 * 256  # the layer's own input and output
    columns = size[0] if transposed else size[1]
    assert sorted(t.numel() for t in kept if t.data_ptr() != packed.data_ptr()) == [20 * columns]
