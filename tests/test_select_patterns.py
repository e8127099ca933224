"""Quotas per layer and lowest scores: against plain sorting of dense autograd's scores, alone and in custom parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_probe import block_scores, candidates, greedy, unit_gradients
from families import batches, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from thrifty import attach
from thrifty.core.budget import Budget
from thrifty.core.errors import ThriftyError
from thrifty.core.plan import Plan
from thrifty.select.blocks import TopBlocks
from thrifty.select.layers import layer_of
from thrifty.select.probe import STATISTICS, run_probe

FAMILIES = ("llama", "gpt2", "mixtral")


def uneven(seed: int = 0) -> nn.Module:
    """Layers of different size, and a matrix outside them; its names are in no order of size."""
    torch.manual_seed(seed)
    layers = [nn.Linear(16, 40), nn.Linear(16, 8), nn.Linear(16, 24)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers), "out": nn.Linear(16, 28)})


def plan_of(model: nn.Module, select: Any, *, budget: float | int = 0.05, data: Any = None) -> Plan:
    return attach(model, [{"select": select}], budget=budget, batches=data).plan


def by_layer(plan: Plan) -> dict[int | None, int]:
    found: dict[int | None, int] = {}
    for name, size in plan.sizes.items():
        found[layer_of(name)] = found.get(layer_of(name), 0) + size
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("score", STATISTICS)
def test_lowest_blocks_are_the_lowest_of_dense_autograd(score: str, family: str) -> None:
    model, data = build(family, layers=2), batches(2, 5, 11)
    blocks = block_scores(model, unit_gradients(model, data), score=score, size=(8, 8), names=candidates(model))
    expected = greedy(
        [(-value, *rest) for value, *rest in blocks], int(0.05 * sum(p.numel() for p in model.parameters()))
    )
    select = {"blocks": {"score": score, "block_size": 8, "order": "lowest"}}
    plan = plan_of(build(family, layers=2), select, data=data)
    assert {name: {tuple(i) for i in region.index.tolist()} for name, region in plan.items()} == expected
    highest = plan_of(build(family, layers=2), {"blocks": {"score": score, "block_size": 8}}, data=data)
    assert not {(n, *i) for n, r in plan.items() for i in r.index.tolist()} & {
        (n, *i) for n, r in highest.items() for i in r.index.tolist()
    }


@pytest.mark.parametrize("scope", ["global", "per_layer", "per_matrix", "per_row"])
def test_lowest_entries_are_the_smallest_weights(scope: str) -> None:
    model = uneven()
    ceiling = Budget.parse(300).numbers(model)
    select = {"entries": {"score": "magnitude", "scope": scope, "order": "lowest"}}
    weights = {n: p.detach().abs() for n, p in model.named_parameters() if p.ndim > 1}
    plan = plan_of(model, select, budget=300)
    taken = {
        n: plan[n].mask(w.shape) if n in plan else torch.zeros(w.shape, dtype=torch.bool) for n, w in weights.items()
    }
    groups: dict[Any, list[str]] = {}
    for name in weights:
        groups.setdefault({"global": 0, "per_layer": layer_of(name)}.get(scope, name), []).append(name)
    for names in groups.values():
        values, mask = (torch.cat([of[n].flatten() for n in names]) for of in (weights, taken))
        rows = ([values], [mask]) if scope != "per_row" else (values.view(-1, 16), mask.view(-1, 16))
        for row, chosen in zip(*rows, strict=True):
            assert chosen.any()
            assert row[chosen].max() <= row[~chosen].min()
    assert 0.9 * ceiling <= plan.trainable_parameters + (100 if scope == "per_row" else 0)


@pytest.mark.parametrize("kind", ["blocks", "entries"])
def test_each_layer_has_its_share_by_size(kind: str) -> None:
    """Whatever its scores are: one layer's weights are a thousand times the others'."""
    model, other = uneven(), uneven()
    for one in (model, other):
        one["layers"][1].weight.data *= 1000
    shares = {0: 40, 1: 8, 2: 24, None: 28}
    if kind == "entries":
        plan = plan_of(model, {"entries": {"score": "magnitude", "scope": "per_layer"}}, budget=400)
        assert by_layer(plan) == {layer: 4 * share for layer, share in shares.items()}
        assert by_layer(plan_of(other, {"entries": {"score": "magnitude"}}, budget=10)) == {1: 10}
        return
    plan = TopBlocks(score="random", scope="per_layer", block_size=2).select(
        model, probe=None, budget=Budget.parse(400), seed=0
    )
    assert by_layer(plan) == {layer: 4 * share for layer, share in shares.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_of_each_layer_in_dense_autograd(family: str) -> None:
    model, data = build(family, layers=3), batches(2, 5, 11)
    blocks = block_scores(model, unit_gradients(model, data), score="abs_grad", size=(4, 4), names=candidates(model))
    plan = attach(
        build(family, layers=3), {"smt": {"block_size": 4, "scope": "per_layer"}}, budget=0.1, batches=data
    ).plan
    ceiling, total = int(0.1 * sum(p.numel() for p in model.parameters())), sum(block[1] for block in blocks)
    for layer, size in by_layer(plan).items():
        own = sorted((block for block in blocks if layer_of(block[2]) == layer), key=lambda block: -block[0])
        chosen = {(n, *i) for n, r in plan.items() if layer_of(n) == layer for i in r.index.tolist()}
        assert chosen == {(block[2], *block[3]) for block in own[: len(chosen)]}
        assert abs(size - ceiling * sum(block[1] for block in own) / total) <= 16  # a block more or less
    assert len(by_layer(plan)) == 3
    assert 0.95 * ceiling <= plan.trainable_parameters <= ceiling


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 1700), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3))
def test_a_quota_never_exceeds_the_budget(budget: int, h: int, w: int, seed: int) -> None:
    select = TopBlocks(score="random", scope="per_layer", block_size=[h, w])
    if budget < h * w:
        return
    plan = select.select(uneven(), probe=None, budget=Budget.parse(budget), seed=seed)
    assert plan.trainable_parameters <= budget
    assert min(budget, 1600) - plan.trainable_parameters < 4 * h * w  # what is left buys no block, in no layer


def test_strips_of_inputs_come_from_each_layer() -> None:
    data = batches(1, 4, 9)
    options = {"block_size": 4, "scope": "per_layer", "input_budget": "20%"}
    plan = attach(build("llama", layers=3), {"smt": options}, budget=0.03, batches=data).plan
    assert set(by_layer(plan)) == {0, 1, 2}
    kept, of = plan.kept_columns or (0, 1)
    assert 0.1 < kept / of <= 0.2


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"entries": {"scope": "per_layers"}}, "unknown scope 'per_layers'; did you mean 'per_layer'"),
        ({"blocks": {"scope": "per_layr"}}, "unknown scope 'per_layr'; did you mean 'per_layer'"),
        ({"blocks": {"order": "lowst"}}, "unknown order 'lowst'; did you mean 'lowest'"),
        ({"entries": {"order": "highst"}}, "unknown order 'highst'; did you mean 'highest'"),
        ({"rows": {"ordr": "lowest"}}, "unknown option of rows: 'ordr'; did you mean 'order'"),
    ],
)
def test_a_wrong_name_has_a_nearest_one(select: Any, message: str) -> None:
    with pytest.raises(ThriftyError, match=message) as error:
        plan_of(build("llama", layers=1), select)
    assert "\n" not in str(error.value)


def test_a_probe_gives_the_lowest_entries_too() -> None:
    model, data = build("llama", layers=1), batches(1, 4, 9)
    name = "model.layers.0.mlp.up_proj.weight"
    score = run_probe(model, data, grids={name: (1, 1)}, statistics=["squared_grad"]).mean(
        "squared_grad", name, sizes=torch.ones(())
    )
    select = {"entries": {"score": "squared_grad", "order": "lowest", "target_modules": ["up_proj"]}}
    mask = plan_of(model, select, data=data, budget=50)[name].mask(score.shape)
    assert int(mask.sum()) == 50
    assert score[mask].max() <= score[~mask].min()
