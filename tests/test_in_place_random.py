"""One layer trained in place on random cases, beside the same layer under plain autograd in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from thrifty.core.entries import Entries
from thrifty.core.plan import Plan
from thrifty.core.region import Blocks
from thrifty.update.tuning import attach_with

SETTINGS = {  # what the weights are held in, the autocast dtype over it, and the precision of the products
    "float64": (torch.float64, None, torch.float64),
    "float32": (torch.float32, None, torch.float32),
    "bfloat16": (torch.bfloat16, None, torch.bfloat16),
    "float32 under bfloat16": (torch.float32, torch.bfloat16, torch.bfloat16),
    "float32 under float16": (torch.float32, torch.float16, torch.float16),
}


@dataclass(frozen=True)
class Case:
    layer: nn.Module
    region: Blocks | Entries
    micro: tuple[tuple[int, ...], ...]  # the leading dimensions of each micro-batch
    strided: bool
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Ragged blocks or entries in a layer of any shape; one to three micro-batches, some of no token."""
    inputs, outputs = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    transposed, seed = draw(st.booleans()), draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    layer = Conv1D(outputs, inputs) if transposed else nn.Linear(inputs, outputs, bias=draw(st.booleans()))
    rows, columns = layer.weight.shape
    if draw(st.booleans()):
        region = Entries(torch.tensor(draw(st.lists(st.integers(0, rows * columns - 1), min_size=1, unique=True))))
    else:
        h, w = draw(st.sampled_from([1, 3, 8, 16, rows])), draw(st.sampled_from([1, 3, 8, 16, columns]))
        every = st.tuples(st.integers(0, -(-rows // h) - 1), st.integers(0, -(-columns // w) - 1))
        region = Blocks((h, w), torch.tensor(draw(st.lists(every, min_size=1, max_size=9, unique=True))))
    lengths = st.sampled_from([(0,), (1,), (7,), (2, 3), (1, 1)])
    micro = draw(st.lists(lengths, min_size=1, max_size=3).map(tuple))
    return Case(layer, region, micro, draw(st.booleans()), seed)


def inputs_of(case: Case, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Strided: every second number of a wider tensor."""
    wide = [torch.randn(*leading, 2 * width if case.strided else width).to(dtype) for leading in case.micro]
    return [x[..., ::2] if case.strided else x for x in wide]


@pytest.mark.parametrize("setting", SETTINGS)
@settings(max_examples=60, deadline=None)
@given(cases())
def test_gradients_of_any_layer_region_and_precision(setting: str, case: Case) -> None:
    held, autocast, precision = SETTINGS[setting]
    torch.manual_seed(case.seed)
    model = nn.Sequential(copy.deepcopy(case.layer)).to(held)
    exact = copy.deepcopy(model).double()
    before = model[0].weight.detach().clone()
    tuning = attach_with(model, "random_blocks", plan=Plan.of(model, {"0.weight": case.region}))
    inputs, outputs = before.shape if isinstance(case.layer, Conv1D) else before.shape[::-1]
    size = torch.zeros(before.shape, dtype=torch.float64)
    finfo = torch.finfo(precision)
    eps, least = 4 * finfo.eps, 4 * finfo.eps * finfo.smallest_normal + 1e-12
    for x in inputs_of(case, inputs, held):
        mine, theirs = x.detach().requires_grad_(), x.detach().double().requires_grad_()
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            y = model(mine)
        upstream = torch.randn(y.shape).to(y.dtype)
        y.backward(upstream)
        exact(theirs).backward(upstream.double())
        g_TO, x_TI = upstream.double().abs().reshape(-1, outputs), x.double().abs().reshape(-1, inputs)
        size += x_TI.t() @ g_TO if isinstance(case.layer, Conv1D) else g_TO.t() @ x_TI
        weight_OI = before.double().t() if isinstance(case.layer, Conv1D) else before.double()
        bound = eps * (upstream.double().abs() @ weight_OI.abs()) + least
        assert mine.grad.dtype == held
        assert bool(((mine.grad.double() - theirs.grad).abs() <= bound).all())
    (leaf,) = tuning.parameters()
    assert leaf.grad.dtype == torch.promote_types(held, torch.float32)
    found, wanted = leaf.grad.double().flatten(), case.region.gather(exact[0].weight.grad).flatten()
    assert bool(((found - wanted).abs() <= eps * case.region.gather(size).flatten() + least).all())
    assert torch.equal(model[0].weight, before)
