"""Schedules: what cannot be is said, and what the optimizer must hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build
from test_schedule import step
from torch import nn

from thrifty import attach
from thrifty.core.errors import ThriftyError


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"lisa": {"period": 0}}, "period 0 is not valid: give a number of steps of 1 or more"),
        ({"hft": {"period": 2.5}}, "period 2.5 is not valid"),
        ({"lift": {"refresh": 0}}, "refresh 0 is not valid"),
        ({"greentrainer": {"period": 2}}, "period 2 is not valid: give a number of steps of 3 or more"),
        ({"greentrainer": {"rho": 1.5}}, "rho 1.5 is not a share"),
        ({"lisa": {"layers": 3}}, "layers 3 is more than the 2 layers of the model: lower it"),
        ({"lisa": {"layers": 0}}, "layers 0 is not valid"),
        ({"lisa": {"importance": [1, 2, 3]}}, "a number for each of the 2 layers"),
        ({"lisa": {"importance": [1, 0]}}, "at least 2 of them above 0"),
        ({"composable_sft": {"phase1": 0}}, "phase1 0 is not valid"),
        ({"composable_sft": {"phase1": 1.0}}, "leaves no step for the second phase"),
    ],
)
def test_what_cannot_be_is_said_and_changes_nothing(method: Any, said: str) -> None:
    model = build("llama", layers=2)
    with pytest.raises(ThriftyError, match=said) as caught:
        attach(model, method)
    assert "\n" not in str(caught.value)
    assert not any(hasattr(module, "_thrifty") for module in model.modules())


def test_a_schedule_needs_all_leaves_in_one_optimizer() -> None:
    tuning = attach(build("llama", layers=2), {"hft": {"period": 1}})
    with pytest.raises(ThriftyError, match=r"holds 2 of \d+ leaves: .*in one optimizer"):
        step(tuning, torch.optim.SGD(tuning.parameters()[:2], lr=0.1))
    step(tuning, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))  # another model's
    assert tuning.step == 0


def test_groups_of_the_optimizer_keep_their_kinds() -> None:
    """A new matrix joins the matrices' group, a new vector the vectors'; parameters of others stay."""
    tuning, extra = attach(build("llama", layers=3), {"hft": {"period": 1}}), nn.Parameter(torch.zeros(3))
    leaves = tuning.parameters()
    matrices, vectors = ([p for p in leaves if (p.ndim > 1) == wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW([{"params": [extra, *matrices]}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2)
    for i in range(4):
        step(tuning, optimizer, seed=i)
        first, second = (group["params"] for group in optimizer.param_groups)
        assert first[0] is extra
        assert all(p.ndim > 1 for p in first[1:])
        assert all(p.ndim == 1 for p in second)
        assert {id(p) for p in first[1:] + second} == {id(p) for p in tuning.parameters()}


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"composable_sft": {"phase1": 2}}, r"the change of model\.norm\.weight after 2 steps is not finite: .*"),
        ({"greentrainer": {"period": 9}}, r"how much model\.norm\.weight lowered the loss is not finite: .*"),
    ],
)
def test_a_run_that_diverged_is_not_ranked(method: Any, said: str) -> None:
    tuning = attach(build("llama", layers=2), method, budget=100 if "composable_sft" in method else None)
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    step(tuning, optimizer)
    plan = tuning.plan

    def spoil(leaf: nn.Parameter) -> None:
        assert leaf.grad is not None
        leaf.grad[0] = torch.nan

    tuning.named_leaves()["model.norm.weight"].register_post_accumulate_grad_hook(spoil)
    with pytest.raises(ThriftyError, match=said + "lower learning_rate") as caught:
        step(tuning, optimizer)
    assert "\n" not in str(caught.value)
    assert tuning.plan == plan
