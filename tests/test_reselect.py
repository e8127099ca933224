"""Blocks and entries chosen by gradient again while a model trains."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import pytest
import torch
from contract_cells import logits, named
from families import batches, build
from test_schedule import adamw, dense, moments, step
from tiny_run import start
from torch import nn

from thrifty import attach
from thrifty.core.errors import ThriftyError
from thrifty.update.tuning import attach_with

DATA = batches(2, 4, 9)
METHODS: dict[str, dict[str, Any]] = {
    "blocks": {"smt": {"block_size": 4, "reselect_every": 2}},
    "strips": {"smt": {"block_size": 4, "reselect_every": 2, "input_budget": "30%"}},
    "entries": {"custom": {"parts": [{"select": {"entries": {"score": "squared_grad"}}}], "reselect_every": 2}},
    "columns by their input": {"smt": {"score": "input_norm", "block_size": "column", "reselect_every": 2}},
}


def fresh(tuning: Any, method: dict[str, Any], *, dtype: torch.dtype = torch.float32) -> Any:
    """The plan of a model that has the trained weights from the start."""
    model = build("llama", dtype, layers=2)
    model.load_state_dict(
        {name: p for name, p in named(tuning.model).items() if name in dict(model.named_parameters())}
    )
    return attach(model, method, budget=0.05, batches=DATA).plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", METHODS)
def test_every_two_steps_the_plan_is_that_of_the_weights_as_they_are(case: str, dtype: torch.dtype) -> None:
    method, model = METHODS[case], build("llama", dtype, layers=2)
    first = named(model)
    tuning = attach(model, method, budget=0.05, batches=iter(DATA))
    optimizer, ever, changed = adamw(tuning), {}, 0
    for i in range(6):
        before, held = tuning.plan, {}
        for name, region in before.items():
            ever[name] = ever.get(name, 0) + region.mask(first[name].shape).int()
        replan = tuning.replan

        def noting(choose: Any, held: dict[str, Any] = held, replan: Any = replan) -> None:
            """The moments that this step made, seen before the plan changes."""
            held.update({key: moments(tuning, optimizer, first, key) for key in ("exp_avg", "exp_avg_sq")})
            replan(choose)

        tuning.replan = noting
        step(tuning, optimizer, seed=i)
        if not i % 2:
            assert tuning.plan is before
            assert not held
            tuning.replan = replan
            continue
        tuning.replan = replan
        assert held
        assert dict(tuning.plan) == dict(fresh(tuning, method, dtype=dtype))
        assert abs(tuning.trainable_parameters - before.trainable_parameters) <= 0.1 * before.trainable_parameters
        changed += dict(tuning.plan) != dict(before)
        assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in tuning.parameters()}
        for name, region in tuning.plan.items():
            here = region.mask(first[name].shape)
            stays = here & before[name].mask(first[name].shape) if name in before else torch.zeros_like(here)
            for key, values in held.items():
                now = moments(tuning, optimizer, first, key)[name]
                assert not stays.any() or torch.equal(now[stays], values[name][stays])
                assert not now[here & ~stays].any()
        leaves = {id(leaf) for leaf in tuning.parameters()}
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters() if id(p) not in leaves)
        assert all(leaf.requires_grad for leaf in tuning.parameters())
    assert changed >= 2
    delta, trained = tuning.delta(), logits(model)
    for name, p in named(model).items():
        if name in first:
            was_trained = ever.get(name, torch.zeros(first[name].shape, dtype=torch.int)).bool()
            assert torch.equal(p[~was_trained], first[name][~was_trained]), name
            assert not was_trained.any() or (delta.plan[name].mask(p.shape) >= was_trained).all(), name
    assert torch.equal(logits(tuning.finish()), trained)
    delta.remove(model)
    assert all(torch.equal(p, first[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(delta.apply(model)), trained)


def test_the_plan_stays_where_the_weights_do() -> None:
    tuning = attach(build("llama", layers=2), METHODS["blocks"], budget=0.05, batches=DATA)
    before, leaves = tuning.plan, [dense(r, leaf.detach(), before_shape(tuning, n)) for n, r, leaf in of(tuning)]
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.0)
    for i in range(4):
        step(tuning, optimizer, seed=i)
    assert dict(tuning.plan) == dict(before)
    for (name, region, leaf), was in zip(of(tuning), leaves, strict=True):
        assert torch.equal(dense(region, leaf.detach(), before_shape(tuning, name)), was)


def of(tuning: Any) -> list[tuple[str, Any, nn.Parameter]]:
    return [(name, tuning.plan[name], leaf) for name, leaf in tuning.named_leaves().items()]


def before_shape(tuning: Any, name: str) -> torch.Size:
    return torch.Size(tuning.plan.shapes[name])


def test_restored_in_the_middle_the_next_plan_is_the_same() -> None:
    plans: dict[str, Any] = {}
    for case in ("whole", "restored"):
        tuning = attach(build("llama", layers=2), METHODS["blocks"], budget=0.05, batches=DATA)
        optimizer = torch.optim.SGD(tuning.parameters(), lr=0.5)
        for i in range(6):
            if case == "restored" and i == 3:
                state = {name: value.clone() for name, value in tuning.state().items()}
                plan, progress = tuning.plan, tuning.progress()
                tuning = attach(build("llama", layers=2), METHODS["blocks"], budget=0.05, batches=DATA)
                tuning.restore(plan, state, progress)
                optimizer = torch.optim.SGD(tuning.parameters(), lr=0.5)
            step(tuning, optimizer, seed=i)
        plans[case] = dict(tuning.plan), logits(tuning.model)
    assert plans["whole"][0] == plans["restored"][0]
    assert torch.equal(plans["whole"][1], plans["restored"][1])


@pytest.mark.parametrize(
    "parts",
    [
        [{"select": {"weights": {"target_modules": ["q_proj"]}}, "update": {"low_rank": {"r": 2}}}],
        [
            {"select": {"weights": {"target_modules": ["q_proj"]}}, "update": {"low_rank": {"r": 2}}},
            {"select": {"entries": {"target_modules": ["up_proj"]}}, "budget": "1%"},
        ],
    ],
)
def test_low_rank_pairs_are_refused(parts: Any) -> None:
    model = build("llama", layers=2)
    with pytest.raises(
        ThriftyError, match=r"'custom' changes its plan .*q_proj.weight trains a low_rank region"
    ) as error:
        attach(model, {"custom": {"parts": parts, "reselect_every": 2}}, batches=DATA)
    assert "\n" not in str(error.value)
    assert not any(hasattr(module, "_thrifty") for module in model.modules())
    attach(model, parts, batches=DATA)  # as long as the plan stays


@pytest.mark.parametrize("every", [0, True, 2.5, "10"])
def test_a_wrong_period_is_named(every: Any) -> None:
    with pytest.raises(
        ThriftyError, match=rf"reselect_every {every!r} is not valid: give a number of steps of 1 or more"
    ):
        attach(build("llama", layers=1), {"smt": {"reselect_every": every}}, batches=DATA)


def test_a_restored_plan_needs_the_batches_too() -> None:
    plan = attach(build("llama", layers=2), METHODS["blocks"], budget=0.05, batches=DATA).plan
    with pytest.raises(ThriftyError, match="looks at gradients again while it trains: pass batches"):
        attach_with(build("llama", layers=2), METHODS["blocks"], budget=0.05, plan=plan)


def _rank(rank: int, port: int, case: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(minutes=5))
    model, shared = build("llama", layers=2), batches(2, 4, 9, seed=0)
    own = batches(2, 4, 9, seed=rank)
    if case == "start apart":
        with pytest.raises(ThriftyError, match="the processes chose different plans"):
            attach(model, {"random_blocks": {"block_size": 4}}, budget=0.05, seed=rank)
    tuning = attach(model, METHODS["blocks"], budget=0.05, batches=shared)
    rebuilt: list[int] = []
    tuning.rebuild = lambda: rebuilt.append(tuning.step)
    optimizer, before = torch.optim.SGD(tuning.parameters(), lr=0.5), tuning.plan
    step(tuning, optimizer)
    if case == "apart":  # what the second looks at from here on: units are shared out, so both choose the same
        tuning.look = {**tuning.look, "batches": own}
    step(tuning, optimizer)
    assert dict(tuning.plan) != dict(before)
    assert rebuilt == [2]
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("case", ["together", "apart", "start apart"])
def test_processes_must_choose_the_same_plan(case: str) -> None:
    """And none waits for one that could not choose."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(_rank, rank, port, case) for rank in range(2)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
