"""`with tuning.base()`: the untouched model, bit for bit, and the trained one back again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from attached import BATCH, random_blocks, step
from contract_cells import logits
from families import batches, build

from thrifty import attach

METHODS = ["full", {"random_blocks": {"block_size": 8}}, {"peft": {"r": 2}}]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_base_is_the_untouched_model_and_the_trained_one_comes_back(
    family: str, dtype: torch.dtype, method: Any
) -> None:
    model = build(family, dtype, layers=2)
    untouched = logits(model)
    tuning = attach(model, method, budget=0.05 if "random_blocks" in method else None)
    with tuning.base() as base:  # before any step too
        assert torch.equal(logits(base), untouched)
    step(tuning, torch.optim.SGD(tuning.parameters(), lr=1.0))
    trained = logits(tuning.model)
    assert not torch.equal(trained, untouched)
    with tuning.base() as base:
        assert not torch.is_grad_enabled()
        assert torch.equal(logits(base), untouched)
    assert torch.is_grad_enabled()
    assert torch.equal(logits(tuning.model), trained)
    with pytest.raises(KeyError), tuning.base():
        raise KeyError("inside")
    assert torch.equal(logits(tuning.model), trained)


def test_base_right_after_a_step_that_was_not_seen() -> None:
    model, tuning = random_blocks()
    untouched = logits(model)
    tuning.model(**BATCH).loss.backward()
    for leaf in tuning.parameters():
        leaf.data.add_(0.1)
    with tuning.base():
        assert torch.equal(logits(model), untouched)
        assert torch.equal(model.state_dict()[next(iter(tuning.plan))], build("llama", layers=2).get_parameter(
            next(iter(tuning.plan))))  # fmt: skip
    assert not torch.equal(logits(model), untouched)


def test_base_inside_base_and_a_step_inside_it() -> None:
    model, tuning = random_blocks()
    optimizer, untouched = torch.optim.SGD(tuning.parameters(), lr=0.5), logits(model)
    step(tuning, optimizer)
    once = logits(model)
    with tuning.base():
        with tuning.base():
            assert torch.equal(logits(model), untouched)
        assert torch.equal(logits(model), untouched)
        optimizer.step()
        assert torch.equal(logits(model), untouched)
    twice = logits(model)
    assert not torch.equal(twice, once)
    tuning.sync()
    assert torch.equal(logits(model), twice)


@pytest.mark.parametrize("method", ["full", "smt"])
def test_the_base_inside_autocast_is_the_base(method: str) -> None:
    model, (batch,) = build("llama"), batches(1, 2, 8)
    base = copy.deepcopy(model)
    tuning = attach(model, method, batches=[batch], budget=0.05 if method == "smt" else None)
    optimizer = torch.optim.SGD(tuning.parameters(), lr=1.0)
    tuning.model(**batch).loss.backward()
    optimizer.step()
    ids = {"input_ids": batch["input_ids"]}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = tuning.model(**ids).logits
        with tuning.base() as reference:
            found = reference(**ids).logits
        again = tuning.model(**ids).logits
        expected = base(**ids).logits
    assert torch.equal(found, expected)
    assert torch.equal(again, trained)
    assert not torch.equal(trained, expected)
