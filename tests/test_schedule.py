"""Plans that change while a model trains: what stays, what leaves, what comes back."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract_cells import logits, named, summed_loss
from families import batches, build
from torch import Tensor

from thrifty import attach
from thrifty.core.budget import Budget
from thrifty.core.entries import Entries, union
from thrifty.core.errors import ThriftyError
from thrifty.core.plan import Plan, kind_of
from thrifty.core.region import Blocks, Region, Whole
from thrifty.select.entries import TopEntries
from thrifty.select.layers import layer_of

DTYPES = [torch.float32, torch.bfloat16]
Q0, Q1, GATE = (
    f"model.layers.{name}.weight" for name in ("0.self_attn.q_proj", "1.self_attn.q_proj", "0.mlp.gate_proj")
)


def step(tuning: Any, optimizer: torch.optim.Optimizer, *, seed: int = 0) -> None:
    (batch,) = batches(1, 2, 8, seed=seed)
    optimizer.zero_grad()
    summed_loss(tuning.model, batch).backward()
    optimizer.step()


def adamw(tuning: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(tuning.parameters(), lr=1e-2)


def dense(region: Region, values: Tensor, shape: torch.Size) -> Tensor:
    out = torch.zeros(shape, dtype=values.dtype)
    region.scatter_(out, values)
    return out


def moments(tuning: Any, optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    found = {}
    for name, leaf in tuning.named_leaves().items():
        values = optimizer.state.get(leaf, {}).get(key, torch.zeros_like(leaf))
        found[name] = dense(tuning.plan[name], values, weights[name].shape)
    return found


def entries(shape: torch.Size, count: int, seed: int) -> Entries:
    return Entries(torch.randperm(shape.numel(), generator=torch.Generator().manual_seed(seed))[:count])


PLANS: dict[str, Callable[[dict[str, Tensor]], dict[str, Region]]] = {
    "entries": lambda w: {Q0: entries(w[Q0].shape, 200, 1), Q1: Whole(), GATE: entries(w[GATE].shape, 90, 2)},
    "other entries": lambda w: {Q0: entries(w[Q0].shape, 300, 3), GATE: entries(w[GATE].shape, 90, 2)},
    "blocks": lambda w: {
        Q0: Blocks((8, 8), torch.tensor([[0, 1], [2, 2]])),
        Q1: Blocks((8, 8), torch.tensor([[1, 1]])),
    },
    "whole": lambda w: {Q0: Whole(), "model.norm.weight": Whole()},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moving_from_plan_to_plan(dtype: torch.dtype) -> None:
    """Weights, offsets and moments of surviving numbers go on to the bit; the delta holds all that was ever trained."""
    model = build("llama", dtype, layers=2)
    start, base_logits = named(model), logits(model)
    tuning = attach(model, {"lift": {"rank": 4, "refresh": 1000}}, budget=0.02)
    tuning.replan(lambda plain: Plan.of(plain, PLANS["entries"](start)))
    optimizer = adamw(tuning)
    ever = {name: region.mask(start[name].shape) for name, region in tuning.plan.items()}
    for i, name in enumerate(["other entries", "blocks", "entries", "whole", "blocks"]):
        step(tuning, optimizer, seed=i)
        before, old = {n: p for n, p in named(model).items() if n in start}, tuning.plan
        offsets = {n: dense(old[n], leaf.detach(), start[n].shape) for n, leaf in tuning.named_leaves().items()}
        held = {key: moments(tuning, optimizer, start, key) for key in ("exp_avg", "exp_avg_sq")}
        tuning.replan(lambda plain, name=name: Plan.of(plain, PLANS[name](start)), optimizer=optimizer)
        for n, p in named(model).items():
            assert n not in start or torch.equal(p, before[n]), (name, n)
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in tuning.parameters()]
        assert set(optimizer.state) <= set(tuning.parameters())
        for n, leaf in tuning.named_leaves().items():
            here = tuning.plan[n].mask(start[n].shape)
            stays = here & old[n].mask(start[n].shape) if n in old else torch.zeros_like(here)
            for key, values in held.items():
                now = moments(tuning, optimizer, start, key)[n]
                assert torch.equal(now[stays], values[n][stays] if n in old else now[stays]), (name, n, key)
                assert not now[~stays].any(), (name, n, key)
            if leaf.shape != start[n].shape or dtype == torch.bfloat16:
                now = dense(tuning.plan[n], leaf.detach(), start[n].shape)
                if n in old and not (isinstance(old[n], Whole) and dtype == torch.float32):
                    assert torch.equal(now[stays], offsets[n][stays]), (name, n)
                returned = (before[n].float() - start[n].float())[here & ~stays]
                assert torch.equal(now[here & ~stays], returned), (name, n)
            ever[n] = ever.get(n, torch.zeros_like(here)) | here
    step(tuning, optimizer, seed=9)
    with tuning.base():
        assert torch.equal(logits(model), base_logits)
    delta = tuning.delta()
    assert delta.plan.keys() == ever.keys()
    for n, mask in ever.items():
        assert torch.equal(delta.plan[n].mask(start[n].shape), mask), n
    trained = logits(model)
    assert torch.equal(logits(tuning.finish()), trained)
    delta.remove(model)
    for n, p in model.named_parameters():
        assert torch.equal(p, start[n]), n
    assert torch.equal(logits(delta.apply(model)), trained)


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("method", [{"lift": {"rank": 4, "refresh": 1000}}, {"hft": {"period": 1000}}], ids=str)
def test_a_plan_that_cannot_be_made_leaves_the_one_before(method: Any, carry: bool) -> None:
    """And training goes on as if nobody had asked, moments and all."""
    dtype, ends, rebuilt = torch.bfloat16, [], []
    for wrong in (True, False):
        tuning = attach(build("llama", dtype, layers=2), method, budget=0.02 if "lift" in method else None, seed=1)
        optimizer, plan = adamw(tuning), tuning.plan
        step(tuning, optimizer)
        before = logits(tuning.model)
        if wrong:
            tuning.rebuild = lambda: rebuilt.append(1)
            with pytest.raises(ThriftyError, match="unknown parameter"):
                tuning.replan(
                    lambda plain: Plan.of(plain, {"model.norm.wait": Whole()}), optimizer=optimizer, carry=carry
                )
            assert rebuilt
        assert tuning.plan == plan
        assert torch.equal(logits(tuning.model), before)
        step(tuning, optimizer, seed=1)
        ends.append(logits(tuning.model))
        assert not torch.equal(ends[-1], before)
    assert torch.equal(*ends)


def test_union_of_regions() -> None:
    shape, draw = (20, 12), torch.Generator().manual_seed(0)
    one, other = (Blocks((4, 4), torch.tensor(index)) for index in ([[0, 0], [1, 2]], [[1, 2], [4, 0]]))
    some = Entries(torch.randperm(240, generator=draw)[:30])
    for a in (one, other, some, Whole()):
        for b in (one, other, some, Whole()):
            assert torch.equal(union(a, b, shape).mask(shape), a.mask(shape) | b.mask(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lisa_keeps_state_of_the_drawn_layers_embeddings_norm_and_head_alone(dtype: torch.dtype) -> None:
    tuning = attach(build("llama", dtype, layers=4), {"lisa": {"layers": 2, "period": 2}}, seed=3)
    optimizer, drawn = adamw(tuning), []
    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for i in range(8):
        trained = dict(tuning.named_leaves())
        step(tuning, optimizer, seed=i)
        if (i + 1) % 2:  # the second step of a round draws the next one
            assert {n for n, leaf in trained.items() if leaf in optimizer.state} == set(trained) == set(tuning.plan)
            assert len(optimizer.state) == len(trained)
            layers = {layer_of(name) for name in trained} - {None}
            assert len(layers) == 2
            assert {name for name in trained if layer_of(name) is None} == outside
            assert all(sum(layer_of(name) == layer for name in trained) == 9 for layer in layers)
            drawn.append(layers)
            steps = {name: int(optimizer.state[leaf]["step"]) for name, leaf in trained.items()}
            assert all(steps[name] == i + 1 for name in outside)
            assert len(drawn) < 2 or all(steps[n] == 1 for n in trained if layer_of(n) in layers - drawn[-2])
    assert len({frozenset(layers) for layers in drawn}) > 1
    changed = {name for name in tuning.delta().plan if layer_of(name) is not None}
    assert {layer_of(name) for name in changed} == set.union(
        *drawn
    )  # and not the layers drawn last, which no step moved


def test_lisa_draws_by_importance() -> None:
    method = {"lisa": {"layers": 1, "period": 1, "importance": [0, 0, 1, 0]}}
    tuning = attach(build("llama", layers=4), method)
    optimizer = adamw(tuning)
    for i in range(3):
        assert {layer_of(name) for name in tuning.plan} == {2, None}
        step(tuning, optimizer, seed=i)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hft_freezes_half_of_each_category_bit_for_bit(family: str) -> None:
    model = build(family, layers=4)
    tuning = attach(model, {"hft": {"period": 3}}, seed=1)
    optimizer, plans = adamw(tuning), []
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
    for _ in range(3):
        plan, before = tuning.plan, named(model)
        plans.append(set(plan))
        for i in range(3):
            step(tuning, optimizer, seed=i)
        for name, p in before.items():
            assert torch.equal(dict(model.named_parameters())[name], p) == (name not in plan), name
        for kind in ("attention", "mlp", "norms"):
            names = {n for n in before if layer_of(n) is not None and not n.endswith("bias")}
            names = {n for n in names if (kind_of(n) == kind if n in matrices else kind == "norms")}
            for layer in range(4):
                here = {n for n in names if layer_of(n) == layer}
                assert len(here & set(plan)) in (len(here) // 2, (len(here) + 1) // 2), (kind, layer)
            assert len(names & set(plan)) == len(names) / 2, kind
    assert plans[0] != plans[1] != plans[2]


def test_lift_refreshes_its_mask_from_the_weights_alone_and_carries_moments() -> None:
    model = build("llama", layers=2)
    tuning = attach(model, {"lift": {"rank": 4, "refresh": 2}}, budget=0.05, seed=1)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.1)
    first = tuning.plan
    step(tuning, optimizer, seed=0)
    held, weights = {}, named(build("llama", layers=2))

    def keep(*_: object) -> None:  # the last hook before the plan changes sees what the second step made
        held.update(moments(tuning, optimizer, weights, "exp_avg"))

    handle = optimizer.register_step_post_hook(keep)
    step(tuning, optimizer, seed=1)
    handle.remove()
    now = moments(tuning, optimizer, weights, "exp_avg")
    # another model with these weights, which saw no data
    other = build("llama", seed=5, layers=2)
    other.load_state_dict(model.state_dict())
    select = TopEntries(score="low_rank_magnitude", scope="per_matrix", rank=4)
    regions = {name: (first[name], region) for name, region in tuning.plan.items()}
    assert any(a != b for a, b in regions.values())
    seed = random.Random("1/1").getrandbits(31)  # of the run's first round, for the randomized SVD
    again = select.select(other, probe=None, budget=Budget(fraction=0.05), seed=seed)
    assert dict(again) == dict(tuning.plan)
    stayed = 0
    for name, (old, new) in regions.items():
        both = old.mask(weights[name].shape) & new.mask(weights[name].shape)
        assert torch.equal(now[name][both], held[name][both]), name
        assert not now[name][~both].any()
        stayed += int(both.sum())
    assert 0 < stayed < tuning.plan.trainable_parameters


def test_composable_sft_starts_its_second_phase_from_the_base_with_what_changed_most() -> None:
    model, twin, budget = build("llama", layers=2), build("llama", layers=2), 500
    start = named(model)
    tuning = attach(model, {"composable_sft": {"phase1": 3}}, budget=budget)
    full = attach(twin, "full")
    optimizer, other = adamw(tuning), adamw(full)
    for i in range(3):
        assert tuning.plan.trainable_share == 1
        step(tuning, optimizer, seed=i)
        step(full, other, seed=i)
    now = {n: p for n, p in model.named_parameters() if n in start}
    assert all(torch.equal(p, start[n]) for n, p in now.items())
    assert not optimizer.state
    assert tuning.plan.trainable_parameters == budget
    change = torch.cat([(p.detach() - start[n]).abs().flatten() for n, p in twin.named_parameters()])
    masks = {
        n: tuning.plan[n].mask(p.shape) if n in tuning.plan else torch.zeros_like(p).bool() for n, p in start.items()
    }
    kept = torch.cat([mask.flatten() for mask in masks.values()])
    assert change[kept].min() >= change[~kept].max()
    for i in range(3, 5):
        step(tuning, optimizer, seed=i)
    delta = tuning.delta()
    assert delta.plan.trainable_parameters == budget
    for n, p in tuning.finish().named_parameters():
        assert not (p != start[n])[~masks[n]].any(), n


def test_composable_sft_needs_to_know_how_many_steps_a_share_is_of() -> None:
    tuning = attach(build("llama", layers=2), {"composable_sft": {"phase1": "50%"}}, budget=100)
    with pytest.raises(ThriftyError, match=r"nobody said how many there are: set tuning\.total_steps"):
        step(tuning, adamw(tuning))
    tuning.total_steps = 4
    optimizer = adamw(tuning)
    for share in (1, 1, 100 / tuning.plan.total, 100 / tuning.plan.total):
        assert tuning.plan.trainable_share == share
        step(tuning, optimizer)
