"""Regions: counting, gathering, scattering, masks and files, on random shapes with ragged edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thrifty.core.errors import ThriftyError
from thrifty.core.plan import Plan, plan_from_files, plan_to_files, region_from_files
from thrifty.core.region import Blocks, Region, Whole

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.bool]


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Blocks, tuple[int, ...]]:
    """Blocks and the shape of the tensor that they lie in."""
    out, columns = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    experts = draw(st.sampled_from([(), (1,), (3,)]))
    h, w = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    grid = (*experts, -(-out // h), -(-columns // w))
    every = st.tuples(*(st.integers(0, n - 1) for n in grid))
    index = draw(st.lists(every, min_size=1, max_size=min(8, math.prod(grid)), unique=True))
    return Blocks((h, w), torch.tensor(index)), (*experts, out, columns)


def plain_mask(region: Blocks, shape: tuple[int, ...]) -> Tensor:
    """The region drawn block by block with slices."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for *expert, i, j in region.index.tolist():
        h, w = region.shape
        mask[(*expert, slice(i * h, (i + 1) * h), slice(j * w, (j + 1) * w))] = True
    return mask


def counted(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Distinct values where the dtype has as many."""
    values = torch.arange(math.prod(shape)).view(shape)
    return (values % 251).to(dtype) if dtype == torch.bfloat16 else values.to(dtype)


@settings(max_examples=150, deadline=None)
@given(blocks(), st.sampled_from(DTYPES), st.sampled_from([1, 4096]))
def test_gather_scatter_mask_and_size_agree(
    made: tuple[Blocks, tuple[int, ...]], dtype: torch.dtype, large: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("thrifty.core.region._LARGE", large)
        _gather_scatter_mask_and_size_agree(*made, dtype)


def _gather_scatter_mask_and_size_agree(region: Blocks, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mask, tensor = plain_mask(region, shape), counted(shape, dtype)
    before = tensor.clone()
    assert torch.equal(region.mask(shape), mask)
    values = region.gather(tensor)
    assert region.size(shape) == int(mask.sum()) == values.numel()
    assert tuple(values.shape) == region.packed_shape(shape)
    assert values.dtype == dtype
    assert torch.equal(values.double().flatten().sort().values, tensor[mask].double().sort().values)
    # a copy: the tensor does not follow
    new = torch.zeros_like(tensor)
    region.scatter_(new, values)
    values.zero_()
    assert torch.equal(tensor, before)
    assert torch.equal(new, torch.where(mask, before, torch.zeros_like(before)))


@settings(max_examples=60, deadline=None)
@given(blocks())
def test_groups_hold_each_block_once_in_dense_pieces(made: tuple[Blocks, tuple[int, ...]]) -> None:
    region, shape = made
    groups, (out, columns) = region.groups(shape), shape[-2:]
    offset = 0
    for group in groups:
        assert group.offset == offset
        offset += group.numbers
        assert len(group.rows) == len(group.cols) > 0
        assert ((group.rows % out + group.h) <= out).all()
        assert (group.cols + group.w <= columns).all()
    assert offset == region.size(shape)
    assert sum(len(group.rows) for group in groups) == len(region.index)
    assert len({(group.h, group.w) for group in groups}) == len(groups)


@settings(max_examples=60, deadline=None)
@given(blocks())
def test_packed_values_lie_group_by_group(made: tuple[Blocks, tuple[int, ...]]) -> None:
    region, shape = made
    tensor = counted(shape, torch.float64)
    flat, matrix = region.gather(tensor).flatten(), tensor.reshape(-1, shape[-1])
    for group in region.groups(shape):
        for k, (row, col) in enumerate(zip(group.rows.tolist(), group.cols.tolist(), strict=True)):
            piece = flat[group.offset + k * group.h * group.w :][: group.h * group.w].view(group.h, group.w)
            assert torch.equal(piece, matrix[row : row + group.h, col : col + group.w])


@settings(max_examples=60, deadline=None)
@given(blocks())
def test_files_give_the_same_region_back(made: tuple[Blocks, tuple[int, ...]]) -> None:
    region, _ = made
    record, index = region.to_files()
    assert index.dtype == torch.int32
    again = region_from_files(record, index)
    assert again == region
    assert hash(again) == hash(region)
    assert Blocks(region.shape, region.index.flip(0)) == region  # the order in which blocks are listed does not matter


@settings(max_examples=60, deadline=None)
@given(blocks(), st.integers(0, 2), st.sampled_from([-1, 99]))
def test_an_index_outside_is_refused(made: tuple[Blocks, tuple[int, ...]], axis: int, value: int) -> None:
    region, shape = made
    region.check("w", shape)
    index = region.index.clone()
    index[0, axis % index.shape[1]] = value
    with pytest.raises(ThriftyError, match="lies outside w of shape"):
        Blocks(region.shape, index).check("w", shape)
    with pytest.raises(ThriftyError, match=r"is indexed by|are indexed by"):
        region.check("w", (2, *shape) if len(shape) == 2 else shape[1:])


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_is_every_number_of_any_rank(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor, region = torch.randn(shape, dtype=dtype), Whole()
    values = region.gather(tensor)
    assert torch.equal(values, tensor)
    assert values.data_ptr() != tensor.data_ptr()
    assert region.size(shape) == tensor.numel()
    assert region.packed_shape(shape) == shape
    assert region.mask(shape).all()
    assert region_from_files(*region.to_files()) == region
    region.scatter_(tensor, torch.full(shape, 2.0))
    assert (tensor == 2).all()


def test_scatter_casts_to_the_tensor_and_writes_through_a_parameter() -> None:
    parameter = nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))
    Blocks((2, 2), torch.tensor([[1, 1]])).scatter_(parameter, torch.full((1, 2, 2), 1 / 3))
    assert parameter[2:, 2:].tolist() == [[0.333984375] * 2] * 2
    assert parameter[:2].abs().sum() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Blocks((2, 2), torch.tensor([0, 1])), r"must be \[n, 2\] or \[n, 3\]"),
        (lambda: Blocks((2, 2), torch.tensor([[0, 1], [0, 1]])), "1 blocks are listed twice"),
        (lambda: Blocks((0, 2), torch.tensor([[0, 1]])), "must be two positive numbers"),
        (lambda: Blocks((2, 2), torch.zeros(0, 2)).check("w", (4, 4)), "w has no block in the plan"),
        (lambda: Whole().check("w", (0, 3)), "holds no number to train"),
        (lambda: region_from_files({"kind": "wholes"}, None), "unknown kind of region 'wholes'; did you mean 'whole'"),
        (lambda: region_from_files({"kind": "blocks", "shape": [2, 2]}, None), "needs an integer index tensor"),
        (
            lambda: region_from_files({"kind": "blocks", "shape": [2.0, 2]}, torch.zeros(1, 2, dtype=torch.int32)),
            "needs a shape of two integers",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make: object, message: str) -> None:
    with pytest.raises(ThriftyError, match=message):
        make()


def plan() -> tuple[nn.Module, Plan]:
    model = nn.ModuleDict({"b": nn.Linear(6, 4), "a": nn.Linear(4, 6, bias=False)})
    regions: dict[str, Region] = {"a.weight": Blocks((3, 3), torch.tensor([[1, 1], [0, 0]])), "b.bias": Whole()}
    return model, Plan.of(model, regions)


def test_a_plan_is_a_mapping_in_the_models_order() -> None:
    _, made = plan()
    assert list(made) == ["b.bias", "a.weight"]
    assert made.sizes == {"b.bias": 4, "a.weight": 9 + 3}
    assert (made.trainable_parameters, made.total) == (16, 24 + 4 + 24)
    record, tensors = plan_to_files(made)
    again = plan_from_files(record, tensors)
    assert dict(again) == dict(made)
    assert (again.shapes, again.total) == (made.shapes, made.total)


def test_a_plan_names_the_nearest_parameter() -> None:
    model, _ = plan()
    with pytest.raises(ThriftyError, match=r"unknown parameter 'a.wieght'; did you mean 'a.weight'"):
        Plan.of(model, {"a.wieght": Whole()})
    with pytest.raises(ThriftyError, match=r"lies outside a.weight of shape \(6, 4\)"):
        Plan.of(model, {"a.weight": Blocks((3, 3), torch.tensor([[2, 0]]))})
