"""Strip-first: against dense autograd, under both budgets, and what it says."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from dense_probe import block_scores, candidates, greedy, inside_strips, unit_gradients
from families import batches, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from thrifty import attach
from thrifty.core.budget import Budget
from thrifty.core.errors import ThriftyError
from thrifty.core.plan import Plan, plan_from_files, plan_to_files
from thrifty.core.registry import get
from thrifty.run.about import describe
from thrifty.select import Probe, TopBlocks, kept_inputs, same_inputs
from thrifty.select.pick import shares
from thrifty.select.targets import targets
from thrifty.update.tuning import attach_with

SCORES = ("abs_grad", "accumulated_grad", "signed_grad", "squared_grad", "weight_times_grad")


@functools.cache
def setup(family: str) -> tuple[Any, ...]:
    model, data = build(family, layers=2), batches(2, 5, 11)
    return model, data, unit_gradients(model, data)


def groups(names: list[str]) -> list[list[str]]:
    """By name: what the tiny models are known to feed from one input."""
    found: dict[str, list[str]] = {}
    for name in names:
        if "experts" not in name:
            module = name.removesuffix(".weight")
            for shared in ("q_proj", "k_proj", "v_proj"):
                module = module.replace(shared, "qkv")
            found.setdefault(module.replace("gate_proj", "in").replace("up_proj", "in"), []).append(name)
    return list(found.values())


def plan_of(family: str, *, budget: float = 0.05, **options: Any) -> Plan:
    method = {"smt": {"scope": "global"} | options}
    return attach(build(family, layers=2), method, budget=budget, batches=setup(family)[1]).plan


def chosen(plan: Plan) -> dict[str, set[tuple[int, ...]]]:
    return {name: {tuple(i) for i in region.index.tolist()} for name, region in plan.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("block_size", "size"), [([9, 7], (9, 7)), ("column", (10**6, 1))])
def test_strips_then_blocks_are_the_top_of_dense_autograd(
    block_size: Any, size: tuple[int, int], score: str, family: str
) -> None:
    model, _, units = setup(family)
    names = candidates(model)
    blocks = block_scores(model, units, score=score, size=size, names=names)
    allowed = inside_strips(model, blocks, groups=groups(list(names)), names=names, share=0.15)
    assert 0 < len(allowed) < len(blocks)
    expected = greedy(allowed, int(0.05 * sum(p.numel() for p in model.parameters())))
    plan = plan_of(family, score=score, block_size=block_size, input_budget="15%")
    assert chosen(plan) == expected
    assert block_size == "column" or expected != greedy(blocks, int(0.05 * sum(p.numel() for p in model.parameters())))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_per_matrix_gives_every_input_its_share_and_every_matrix_its_blocks(family: str) -> None:
    plan = plan_of(family, scope="per_matrix", block_size=[4, 4], input_budget=0.2)
    model = setup(family)[0]
    assert set(plan) == set(candidates(model))
    assert 0.95 * 0.05 <= plan.trainable_share <= 0.05
    for one in same_inputs(model, plan):
        assert 4 <= kept_inputs(plan, [one])[0] <= 0.2 * one.columns + 4
    free = plan_of(family, scope="per_matrix", block_size=[4, 4])
    assert all(abs(plan.sizes[name] - free.sizes[name]) <= 16 for name in plan)  # strips do not move the shares
    assert plan.kept_columns[0] <= 0.2 * 384 < free.kept_columns[0]


def test_per_kind_gives_each_kind_its_share_of_the_columns() -> None:
    plan = plan_of("llama", scope="per_kind", block_size=[4, 4], input_budget=0.2)
    inputs = same_inputs(setup("llama")[0], targets(setup("llama")[0], "all-linear"))
    kept = {kind: kept_inputs(plan, [i for i in inputs if kind in i.matrices[0].name]) for kind in ("attn", "mlp")}
    assert {kind: total for kind, (_, total) in kept.items()} == {"attn": 160, "mlp": 224}
    assert all(0 < used <= 0.2 * total for used, total in kept.values())


class Mixed(nn.Module):
    """Two inputs, one read by three matrices of two classes, and stacked experts."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_q, self.attn_k = nn.Linear(17, 13, bias=False), nn.Linear(17, 5, bias=False)
        self.mlp_in, self.mlp_out = Conv1D(11, 17), nn.Linear(11, 7, bias=False)
        self.experts = nn.Parameter(torch.zeros(2, 6, 9))

    def forward(self, x: Tensor) -> Tensor:
        return self.attn_q(x).sum() + self.attn_k(x).sum() + self.mlp_out(self.mlp_in(x)).sum()


MIXED = Mixed()
INPUTS = same_inputs(MIXED, dict(MIXED.named_parameters()), batch={"x": torch.zeros(1, 17)})
SHARED = ("attn_q.weight", "attn_k.weight", "mlp_in.weight")


def probe_of(selector: TopBlocks, budget: Budget, seed: int) -> Probe:
    """Random block sums of few values, so that there are ties."""
    generator, sums = torch.Generator().manual_seed(seed), {}
    for name, (h, w) in selector.grids(MIXED, budget).items():
        shape = MIXED.get_parameter(name).shape
        grid = (*shape[:-2], -(-shape[-2] // h), -(-shape[-1] // w))
        sums[name] = torch.randint(0, 4, grid, generator=generator).double()
    return Probe({"abs_grad": sums}, inputs=INPUTS, units=1)


def test_the_mixed_model_has_the_inputs_it_was_built_with() -> None:
    assert [tuple(t.name for t in one.matrices) for one in INPUTS] == [SHARED, ("mlp_out.weight",)]
    assert set(targets(MIXED, "all-linear")) == {*SHARED, "mlp_out.weight", "experts"}


@settings(max_examples=150, deadline=None)
@given(
    budget=st.integers(2, 700),
    columns=st.integers(1, 28),
    block_size=st.one_of(st.sampled_from(["column", "row"]), st.tuples(st.integers(1, 8), st.integers(1, 8))),
    scope=st.sampled_from(["global", "per_kind", "per_matrix"]),
    score=st.sampled_from(["abs_grad", "random"]),
    seed=st.integers(0, 99),
)
def test_neither_budget_is_exceeded_and_strips_are_shared(
    budget: int, columns: int, block_size: Any, scope: str, score: str, seed: int
) -> None:
    selector = TopBlocks(score=score, scope=scope, block_size=block_size, input_budget=(columns + 0.5) / 28.5)
    columns = int((columns + 0.5) / 28.5 * 28 + 1e-9)
    limit = Budget(count=budget)
    probe = probe_of(selector, limit, seed)
    try:
        plan = selector.select(MIXED, probe=probe, budget=limit, seed=seed)
    except ThriftyError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert "buys no" in refused
        return
    assert 0 < plan.trainable_parameters <= budget
    assert kept_inputs(plan, INPUTS) == plan.kept_columns
    assert plan.kept_columns[0] <= columns
    again = selector.select(MIXED, probe=probe, budget=limit, seed=seed)
    assert chosen(again) == chosen(plan)
    # the strips are those that any budget would be given
    wide = selector.select(MIXED, probe=probe, budget=Budget(count=10**6), seed=seed)
    used = {n: wide[n].mask(wide.shapes[n]).any(1 if n == "mlp_in.weight" else 0) for n in SHARED if n in wide}
    assert len(used) in (0, 3)
    assert len({tuple(mask.tolist()) for mask in used.values()}) <= 1
    for name, region in plan.items():
        assert name in wide
        assert not (region.mask(plan.shapes[name]) & ~wide[name].mask(plan.shapes[name])).any()


@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(200, 700),
    size=st.integers(1, 6),
    scope=st.sampled_from(["global", "per_kind", "per_matrix"]),
    seed=st.integers(0, 99),
)
def test_all_columns_is_the_free_choice(budget: int, size: int, scope: str, seed: int) -> None:
    free, all_ = (TopBlocks(scope=scope, block_size=size, input_budget=share) for share in (None, "100%"))
    limit = Budget(count=budget)
    probe = probe_of(free, limit, seed)
    assert chosen(free.select(MIXED, probe=probe, budget=limit, seed=0)) == chosen(
        all_.select(MIXED, probe=probe, budget=limit, seed=0)
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 90)), min_size=1, max_size=7), st.integers(0, 400))
def test_shares_are_in_proportion_until_the_room_is_full(owners: list[tuple[int, int]], ceiling: int) -> None:
    whole, room = [max(w, r) for w, r in owners], [r for _, r in owners]
    given_ = shares(whole, room, ceiling)
    assert all(0 <= share <= r for share, r in zip(given_, room, strict=True))
    assert min(ceiling, sum(room)) - len(owners) < sum(given_) <= ceiling
    rates = [share / w for share, w, r in zip(given_, whole, room, strict=True) if share < r]
    for rate in rates:  # who is not full has the same share by size, rounded down, and no full one has more
        assert all(abs(rate - other) <= 1 for other in rates)
        assert all(r / w <= rate + 1 for w, r, s in zip(whole, room, given_, strict=True) if s == r)


def test_a_budget_that_the_strips_cannot_hold_is_told_with_the_share_that_can(
    caplog: pytest.LogCaptureFixture,
) -> None:
    options: dict[str, Any] = {"block_size": [8, 4]}
    plan = plan_of("llama", budget=0.05, input_budget=0.02, **options)
    (record,) = caplog.records
    text = record.getMessage()
    assert (record.name, record.levelno) == ("thrifty", logging.WARNING)
    assert f"hold {plan.trainable_parameters:,} of the 1,742 numbers that budget 5% allows: all of those are" in text
    enough = text.rsplit(" ", 1)[1]
    caplog.clear()
    fitting = plan_of("llama", budget=0.05, input_budget=enough, **options)
    assert not caplog.records
    assert 0.95 * 0.05 <= fitting.trainable_share <= 0.05
    plan_of("llama", budget=0.05, input_budget=float(enough.rstrip("%")) / 100 - 0.011, **options)
    assert len(caplog.records) == 1  # a strip less would not do


def test_inputs_without_a_strip_are_told_per_matrix(caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_of("llama", budget=0.02, input_budget=0.1, block_size=[4, 16], scope="per_matrix")
    assert plan.kept_columns[0] <= 38
    (text,) = [r.getMessage() for r in caplog.records if "buys no strip" in r.getMessage()]
    assert f"for the inputs of {14 - len(plan)} of 14 matrices" in text


@pytest.mark.parametrize("value", [0, 1.5, 3, True, "ten", "0%", [0.1]])
def test_a_share_that_is_none_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ThriftyError, match=r"input_budget .* is not a share: give 0.1 or '10%'"):
        attach(build("llama", layers=1), {"smt": {"input_budget": value}}, batches=batches(1, 2, 8))


def test_a_choice_without_a_linear_layer_is_refused() -> None:
    method = {"random_blocks": {"target_modules": ["experts.down_proj"], "input_budget": 0.1, "block_size": 4}}
    with pytest.raises(ThriftyError, match=r"no target module is a linear layer .*: remove input_budget"):
        attach(build("mixtral", layers=1), method)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_random_blocks_lie_in_random_strips(family: str) -> None:
    def random_plan(seed: int) -> Plan:
        method = {"random_blocks": {"block_size": 4, "input_budget": "10%", "scope": "global"}}
        return attach(build(family, layers=2), method, budget=0.02, seed=seed).plan

    plans = [random_plan(seed) for seed in (0, 0, 1)]
    total = sum(one.columns for one in same_inputs(build(family, layers=2), plans[0]))
    assert plans[0] == plans[1] != plans[2]
    assert all(plan.kept_columns[0] <= 0.1 * plan.kept_columns[1] for plan in plans)
    assert plans[0].kept_columns[1] >= total


def test_the_plan_says_what_is_kept_and_its_files_too() -> None:
    plan = plan_of("llama", block_size=4, input_budget="10%")
    kept, total = plan.kept_columns
    assert total == 384
    assert f"{kept} of 384 distinct columns kept for backward ({100 * kept / 384:.1f}%)" in str(plan)
    again = plan_from_files(*plan_to_files(plan))
    restored = attach_with(build("llama", layers=2), "smt", plan=again).plan
    assert str(restored) == str(plan)
    without = Plan.of(build("llama", layers=2), plan)
    assert "kept for backward" not in str(without)
    assert plan_from_files(*plan_to_files(without)).kept_columns is None


@pytest.mark.parametrize("method", ["smt", "random_blocks"])
def test_the_registry_shows_the_option(method: str) -> None:
    assert "input_budget" in describe(get(method))
