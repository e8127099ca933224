"""Each way to a group's blocks against the dense product, whatever `choose` would take; and what it takes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from thrifty.core.plan import Plan
from thrifty.core.region import Blocks
from thrifty.kernels.region_ways import BlockByBlock, LineByLine, OneProduct, Runs, StripGroup, Way, choose
from thrifty.update.tuning import attach_with

WAYS = {
    "block": BlockByBlock,
    "row": lambda group: LineByLine.of(group, by_row=True),
    "slot": lambda group: LineByLine.of(group, by_row=False),
    "one": OneProduct.of,
    "chosen": choose,
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@st.composite
def groups(draw: st.DrawFn) -> tuple[StripGroup, int, int]:
    """Blocks of one size in any order, and the widths of `dy` and of the strip: wider than the blocks by any number."""
    h, w = (draw(st.sampled_from([1, 2, 3, 8, 15, 16, 17, 32])) for _ in range(2))
    down, across = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    every = st.tuples(st.integers(0, down - 1), st.integers(0, across - 1))
    places = draw(st.lists(every, min_size=1, max_size=12, unique=True))
    before = draw(st.integers(0, 3))  # a strip shared with blocks of another size: not a multiple of this one
    group = StripGroup(
        h=h, w=w, rows=tuple(i * h for i, _ in places), slots=tuple(before + j * w for _, j in places), offset=0
    )
    return group, down * h + draw(st.integers(0, 5)), before + across * w + draw(st.integers(0, 5))


def matrix(tokens: int, width: int, *, strided: bool, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Strided: token index innermost, every second one."""
    if strided:
        return torch.randn(width, 2 * tokens, generator=generator).to(dtype)[:, ::2].t()
    return torch.randn(tokens, width, generator=generator).to(dtype)


@settings(max_examples=150, deadline=None)
@given(
    groups(),
    st.sampled_from([0, 1, 2, 19]),
    st.sampled_from(DTYPES),
    st.tuples(st.booleans(), st.booleans()),
    st.integers(0, 2**16),
)
def test_every_way_gives_the_dense_blocks(
    case: tuple[StripGroup, int, int], tokens: int, dtype: torch.dtype, strided: tuple[bool, bool], seed: int
) -> None:
    group, outputs, columns = case
    generator = torch.Generator().manual_seed(seed)
    dy = matrix(tokens, outputs, strided=strided[0], generator=generator, dtype=dtype)
    x = matrix(tokens, columns, strided=strided[1], generator=generator, dtype=dtype)
    exact, size = dy.double().t() @ x.double(), dy.double().abs().t() @ x.double().abs()

    def blocks(dense: Tensor) -> Tensor:
        return torch.stack(
            [dense[r : r + group.h, s : s + group.w] for r, s in zip(group.rows, group.slots, strict=True)]
        )

    bound = 4 * torch.finfo(dtype).eps * blocks(size) + 1e-12
    for name, build in WAYS.items():
        out = torch.full((len(group.rows), group.h, group.w), float("nan"), dtype=dtype)
        way: Way = build(group).to(torch.device("cpu"))
        way.into(dy, x, out)
        assert bool(((out.double() - blocks(exact)).abs() <= bound).all()), name


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=9, unique=True), st.integers(1, 6), st.integers(0, 5))
def test_gathered_runs(places: list[int], size: int, rest: int) -> None:
    columns = (torch.tensor(places)[:, None] * size + torch.arange(size)).flatten()
    x = torch.randn(3, 21 * size + rest)
    for a in (x, torch.randn(21 * size + rest, 6)[:, ::2].t()):
        assert torch.equal(Runs.of(columns).take(a), a[:, columns])


@pytest.mark.parametrize(
    ("size", "places", "expected"),
    [
        ((64, 1), [(0, 3), (0, 9)], OneProduct),  # whole columns
        ((1, 64), [(3, 0), (9, 0)], OneProduct),  # whole rows
        ((8, 8), [(i, j) for i in range(8) for j in range(8)], OneProduct),  # everything
        ((8, 8), [(i, i) for i in range(8)], LineByLine),  # too small to go one by one
        ((16, 16), [(i, (i + k) % 20) for i in range(20) for k in range(3)], LineByLine),  # several on each line
        ((16, 16), [(i, i) for i in range(8)], BlockByBlock),
        ((128, 128), [(i, j) for i in range(4) for j in range(4) if i != j], BlockByBlock),
    ],
)
def test_what_is_chosen(size: tuple[int, int], places: list[tuple[int, int]], expected: type[Way]) -> None:
    (h, w), (rows, slots) = size, zip(*places, strict=True)
    group = StripGroup(h=h, w=w, rows=tuple(r * h for r in rows), slots=tuple(s * w for s in slots), offset=0)
    assert type(choose(group)) is expected


PATTERNS = {
    "columns": ((48, 1), [(0, 1), (0, 7), (0, 8)]),
    "rows": ((1, 64), [(2, 0), (9, 0)]),
    "lines": ((8, 8), [(i, j) for i in range(6) for j in range(8) if (i + j) % 4 == 0]),
    "blocks": ((16, 16), [(0, 0), (1, 2), (2, 3)]),
    "ragged": ((20, 28), [(0, 0), (1, 1), (2, 2), (2, 0), (0, 2)]),
}


@pytest.mark.parametrize("layer", [nn.Linear(64, 48), Conv1D(48, 64)], ids=["linear", "conv1d"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_compiled_accumulated_and_copied(layer: nn.Module, pattern: str) -> None:
    """Two backward passes add up to the dense blocks, in a deep copy and in a compiled module (fullgraph) too."""
    torch._dynamo.reset()  # each layout is a graph of its own, and they count against one limit
    size, places = PATTERNS[pattern]
    if isinstance(layer, Conv1D):  # stored [in, out]
        size, places = (size[1], size[0]), [(j, i) for i, j in places]
    region = Blocks(size, torch.tensor(places))
    inputs = [torch.randn(2, 5, 64) for _ in range(2)]

    dense = copy.deepcopy(layer)
    for x in inputs:
        dense(x).square().sum().backward()
    expected = region.gather(dense.weight.grad)

    model = nn.Sequential(copy.deepcopy(layer))
    attach_with(model, {"random_blocks": {}}, plan=Plan.of(model, {"0.weight": region}))
    runs: list[Any] = [model, copy.deepcopy(model), copy.deepcopy(model)]
    for run in runs:
        (leaf,) = [p for name, p in run.named_parameters() if "offset" in name]
        called = torch.compile(run, backend="aot_eager", fullgraph=True) if run is runs[2] else run
        for x in inputs:
            called(x).square().sum().backward()
        torch.testing.assert_close(leaf.grad.view_as(expected), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_under_autocast_the_product_is_that_of_autocast(pattern: str) -> None:
    size, places = PATTERNS[pattern]
    region = Blocks(size, torch.tensor(places))
    dense, x = nn.Linear(64, 48), torch.randn(2, 9, 64)
    model = nn.Sequential(copy.deepcopy(dense))
    tuning = attach_with(model, {"random_blocks": {}}, plan=Plan.of(model, {"0.weight": region}))
    for run in (dense, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = run(x)
        y.float().square().sum().backward()
    (leaf,) = tuning.parameters()
    expected = region.gather(dense.weight.grad).float()
    assert leaf.grad.dtype == torch.float32
    torch.testing.assert_close(
        leaf.grad.view_as(expected), expected, rtol=2**-7, atol=2**-7 * float(expected.abs().max())
    )
