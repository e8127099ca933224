"""Differences of checkpoints: the planned blocks are found again, exactly; low rank keeps to its error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from delta_cases import bits, deltas, model, tensors
from families import batches, build
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import attach
from thrifty.core.entries import Entries
from thrifty.core.errors import ThriftyError
from thrifty.core.region import Blocks, Whole
from thrifty.delta import Delta, LowRankPiece
from thrifty.delta.diff import diff, region_of


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([torch.float32, torch.bfloat16]).flatmap(lambda d: st.tuples(st.just(d), deltas(d))))
def test_a_difference_makes_the_other_model_bit_for_bit(case: tuple[torch.dtype, Delta]) -> None:
    dtype, delta = case
    tuned, base = model(dtype), model(dtype)
    delta.apply(tuned)
    if bits(tuned) == bits(base):
        return
    found = diff(tensors(base), tensors(tuned))
    start = bits(base)
    found.apply(base)
    assert bits(base) == bits(tuned)
    found.remove(base)
    assert bits(base) == start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", {"smt": {"block_size": 8}}),
        ("llama", {"smt": {"block_size": [14, 6]}}),
        ("gpt2", {"smt": {"block_size": 16}}),
        ("mixtral", {"random_blocks": {"block_size": 8}}),
        ("qwen2", {"random_rows": {}}),
        ("qwen2", {"random_columns": {}}),
        ("llama", {"random_entries": {}}),
    ],
)
def test_it_finds_exactly_what_was_trained(family: str, method: dict[str, Any], dtype: torch.dtype) -> None:
    base = build(family, dtype, layers=2)
    tuned = copy.deepcopy(base)
    tuning = attach(tuned, method, budget=0.03, batches=batches(2, 3, 10), seed=1)
    for leaf in tuning.parameters():
        leaf.data.add_(torch.where(torch.rand(leaf.shape) < 0.5, 0.5, -0.5))
    plan = tuning.plan
    tuning.finish()
    found = diff(dict(base.named_parameters()), dict(tuned.named_parameters()))
    assert found.plan.keys() == plan.keys()
    for name, region in plan.items():
        shape = plan.shapes[name]
        assert torch.equal(found.plan[name].mask(shape), region.mask(shape)), name
    assert found.plan.trainable_parameters == plan.trainable_parameters


def test_the_smallest_form_is_taken() -> None:
    changed = torch.zeros(128, 192, dtype=torch.bool)
    changed[64:128, 64:128] = True
    assert region_of(changed, itemsize=4) == Blocks((64, 64), torch.tensor([[1, 1]]))
    changed[70, 80] = False  # a number that happened to stay
    assert region_of(changed, itemsize=4) == Blocks((64, 64), torch.tensor([[1, 1]]))
    rows = torch.zeros(128, 192, dtype=torch.bool)
    rows[[3, 77]] = True
    assert region_of(rows, itemsize=2) == Blocks((1, 192), torch.tensor([[3, 0], [77, 0]]))
    few = torch.zeros(128, 192, dtype=torch.bool)
    few.view(-1)[[5, 4000, 9001]] = True
    assert region_of(few, itemsize=2) == Entries(torch.tensor([5, 4000, 9001]))
    assert region_of(torch.ones(3, 4, dtype=torch.bool), itemsize=4) == Whole()


@pytest.mark.parametrize("error", [0.5, 0.1, 0.02])
def test_low_rank_keeps_to_its_error_with_the_least_rank(error: float) -> None:
    torch.manual_seed(0)
    base = {"w": torch.randn(96, 80)}
    u, v = torch.linalg.qr(torch.randn(96, 40))[0], torch.linalg.qr(torch.randn(80, 40))[0]
    values = 0.6 ** torch.arange(40)
    tuned = {"w": base["w"] + (u * values) @ v.t()}
    delta = diff(base, tuned, error=error)
    piece = delta.pieces["w"]
    assert isinstance(piece, LowRankPiece)
    left_over = [float(values[r:].norm() / values.norm()) for r in range(41)]
    assert piece.region.r == next(r for r in range(41) if left_over[r] <= error)
    holder = torch.nn.ParameterDict({"w": base["w"].clone()})
    delta.apply(holder)
    change = tuned["w"] - base["w"]
    assert float((holder["w"].detach() - tuned["w"]).norm() / change.norm()) <= error * 1.01 + 1e-5
    delta.remove(holder)
    assert torch.equal(holder["w"], base["w"])
    half, noise = base["w"].bfloat16(), torch.randn(96, 80).bfloat16()
    assert diff({"w": half}, {"w": noise}, error=error / 10).plan["w"] == Whole()  # the exact form is smaller


def test_what_cannot_be_compared_is_named() -> None:
    base = {"a.weight": torch.zeros(2, 3), "b": torch.zeros(2)}
    with pytest.raises(ThriftyError, match=r"the base has no tensor a.weihgt \(nearest: a.weight\)"):
        diff(base, {"a.weihgt": torch.zeros(2, 3), "b": torch.zeros(2)})
    with pytest.raises(ThriftyError, match="the tuned model has no tensor b"):
        diff(base, {"a.weight": torch.zeros(2, 3)})
    with pytest.raises(ThriftyError, match=r"a.weight is torch.float32 \(2, 3\) in the base and torch.bfloat16"):
        diff(base, {"a.weight": torch.zeros(2, 3).bfloat16(), "b": torch.zeros(2)})
    with pytest.raises(ThriftyError, match="the two models are equal"):
        diff(base, base)
    with pytest.raises(ThriftyError, match="error 1 is not valid"):
        diff(base, base, error=1.0)
