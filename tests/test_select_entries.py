"""Single entries: the best of plain dense autograd for every score and scope; counts, ceilings and ties."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from dense_probe import candidates, unit_gradients
from families import batches, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thrifty import attach
from thrifty.core.budget import Budget
from thrifty.core.errors import ThriftyError
from thrifty.core.plan import Plan, kind_of
from thrifty.select import entry_sums
from thrifty.select.entries import ENTRY_SCOPES, TopEntries
from thrifty.select.entry_sums import EntrySums
from thrifty.select.layers import layer_of
from thrifty.select.probe import STATISTICS, run_probe

FAMILIES = ("llama", "gpt2", "mixtral")
BUDGET = 0.03
RANK = 34  # with what is oversampled, all directions of these matrices: then the randomized one is the best


@functools.cache
def setup(family: str) -> tuple[nn.Module, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """A model, ten rows in units of 4, 4 and 2, and their dense gradients."""
    model, data = build(family, layers=2), batches(2, 5, 11)
    return model, data, unit_gradients(model, data)


def oracle(family: str, score: str, *, rank: int = RANK) -> dict[str, Tensor]:
    """The score of every number, float64, as the weight is stored."""
    model, _, units = setup(family)
    found = {}
    for name in candidates(model):
        w, g = model.get_parameter(name).detach().double(), torch.stack([unit[name] for unit in units])
        if score == "low_rank_magnitude":
            u, s, v = torch.linalg.svd(w, full_matrices=False)
            found[name] = ((u * s[..., None, :])[..., :rank] @ v[..., :rank, :]).abs()
            continue
        found[name] = {
            "abs_grad": g.abs().mean(0),
            "accumulated_grad": g.mean(0).abs(),
            "signed_grad": g.mean(0).abs(),
            "squared_grad": g.square().mean(0),
            "weight_times_grad": (w * g).abs().mean(0),
            "magnitude": w.abs(),
        }[score]
    return found


def plan_of(family: str, *, budget: float | int | str | None = BUDGET, seed: int = 0, **options: Any) -> Plan:
    model, data, _ = setup(family)
    selector = TopEntries(**options)
    limit = None if budget is None else Budget.parse(budget)
    grids = selector.grids(model, limit)
    probe = run_probe(model, data, grids=grids, statistics=selector.statistics) if selector.statistics else None
    return selector.select(model, probe=probe, budget=limit, seed=seed)


def check_best(scores: list[tuple[Tensor, Tensor]], count: int) -> None:
    """(scores, mask) of one group: `count` are taken and, but for rounding, none left out is better than one taken."""
    inside = torch.cat([score[mask] for score, mask in scores])
    outside = torch.cat([score[~mask] for score, mask in scores])
    assert len(inside) == count
    if len(outside) and count:
        assert inside.min() >= outside.max() * (1 - 1e-4), (inside.min(), outside.max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ENTRY_SCOPES)
@pytest.mark.parametrize("score", [*STATISTICS, "magnitude", "low_rank_magnitude"])
def test_the_chosen_entries_are_the_best_of_dense_autograd(score: str, scope: str, family: str) -> None:
    model, _, _ = setup(family)
    names, scores = candidates(model), oracle(family, score)
    plan = plan_of(family, score=score, scope=scope, rank=RANK)
    ceiling = int(BUDGET * sum(p.numel() for p in model.parameters()))
    assert 0 < plan.trainable_parameters <= ceiling
    masks = {
        n: plan[n].mask(s.shape) if n in plan else torch.zeros(s.shape, dtype=torch.bool) for n, s in scores.items()
    }
    if scope == "per_row":
        outputs = {n: s.mT if names[n] else s for n, s in scores.items()}
        count = ceiling // sum(s[..., 0].numel() for s in outputs.values())
        for name, score_ in outputs.items():
            mask = masks[name].mT if names[name] else masks[name]
            for row, taken in zip(score_.flatten(0, -2), mask.flatten(0, -2), strict=True):
                check_best([(row, taken)], count)
        return
    group = {"global": lambda n: "", "per_kind": kind_of, "per_layer": layer_of, "per_matrix": lambda n: n}[scope]
    total, spent = sum(s.numel() for s in scores.values()), 0
    for key in {group(n) for n in names}:
        of = [(scores[n], masks[n]) for n in names if group(n) == key]
        share = ceiling * sum(s.numel() for s, _ in of) // total
        check_best(of, share)
        spent += share
    assert plan.trainable_parameters == spent >= 0.95 * ceiling


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("score", ["random", "abs_grad"])
def test_per_row_has_exactly_k_of_every_output(score: str, family: str) -> None:
    model, _, _ = setup(family)
    plan = plan_of(family, score=score, scope="per_row", per_row=3, budget=None)
    assert set(plan) == set(candidates(model))
    for name, transposed in candidates(model).items():
        mask = plan[name].mask(plan.shapes[name])
        assert ((mask.mT if transposed else mask).sum(-1) == 3).all(), name


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 600), st.sampled_from(ENTRY_SCOPES), st.integers(0, 5))
def test_a_budget_is_never_exceeded(budget: int, scope: str, seed: int) -> None:
    model = nn.ModuleDict({"attn": nn.Linear(17, 13, bias=False), "mlp": nn.Linear(11, 9, bias=False)})
    selector = TopEntries(score="random", scope=scope)
    nothing = budget < 22 if scope == "per_row" else scope in ("per_kind", "per_matrix") and budget * 221 // 320 < 1
    if nothing:
        with pytest.raises(ThriftyError, match="raise budget"):
            selector.select(model, probe=None, budget=Budget.parse(budget), seed=seed)
        return
    plan = selector.select(model, probe=None, budget=Budget.parse(budget), seed=seed)
    assert 0 < plan.trainable_parameters <= budget
    if scope == "per_row":
        each = budget // 22
        assert plan.trainable_parameters == 13 * min(each, 17) + 9 * min(each, 11)
    else:
        assert min(budget, 320) - plan.trainable_parameters < {"global": 1}.get(scope, 2)


@pytest.mark.parametrize("scope", ENTRY_SCOPES)
def test_ties_go_to_the_earlier_entry(scope: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 20, bias=False), "b": nn.Linear(64, 20, bias=False)})
    for p in model.parameters():
        nn.init.ones_(p)
    plan = TopEntries(score="magnitude", scope=scope).select(model, probe=None, budget=Budget.parse(200), seed=0)
    first = {"global": [(0, 200), (0, 0)], "per_kind": [(0, 200), (0, 0)], "per_matrix": [(0, 100), (0, 100)]}
    for name, (start, stop) in zip(("a.weight", "b.weight"), first.get(scope, []), strict=False):
        found = plan[name].index.tolist() if name in plan else []
        assert found == list(range(start, stop))
    if scope == "per_row":
        expected = [64 * row + i for row in range(20) for i in range(5)]
        assert [plan[n].index.tolist() for n in plan] == [expected, expected]


def test_random_entries_follow_the_seed() -> None:
    plans = [plan_of("llama", score="random", seed=seed) for seed in (0, 0, 1)]
    assert dict(plans[0]) == dict(plans[1])
    assert dict(plans[0]) != dict(plans[2])


def test_the_randomized_approximation_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    plan_of("llama", score="low_rank_magnitude", rank=2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("options", "budget", "message"),
    [
        ({"score": "abs_grd"}, 0.1, "unknown score 'abs_grd'; did you mean 'abs_grad'"),
        ({"scope": "per_rows"}, 0.1, "unknown scope 'per_rows'; did you mean 'per_row'"),
        ({"scope": "per_row", "per_row": 0}, 0.1, "per_row 0 is not valid: give a number of 1 or more"),
        ({"rank": True}, 0.1, "rank True is not valid"),
        ({"per_row": 3}, 0.1, "per_row is for scope 'per_row', not 'global'"),
        (
            {"scope": "per_row", "per_row": 41},
            None,
            "per_row 41 is more than the 40 inputs of .*q_proj.*: lower per_row",
        ),
        ({"scope": "per_row"}, 100, "does not buy 1 entries for each of 608 rows: raise budget to at least 608"),
        ({"scope": "per_row", "per_row": 9}, 2000, "raise budget to at least 5472"),
        ({"scope": "per_matrix", "score": "random"}, 3, "split by scope 'per_matrix', buys no entry: raise budget"),
        ({"score": "random"}, 1e-9, "buys no entry: raise budget"),
        ({"layers": 7}, 0.1, "layer 7 lies outside the model: the model has layers 0 to 1"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, Any], budget: Any, message: str) -> None:
    with pytest.raises(ThriftyError, match=message) as error:
        plan_of("llama", budget=budget, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("score", ["magnitude", "low_rank_magnitude"])
def test_weights_that_are_not_finite_are_named(score: str) -> None:
    model = build("llama", layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(ThriftyError, match=r"mlp\.up_proj\.weight holds numbers that are not finite"):
        TopEntries(score=score).select(model, probe=None, budget=None, seed=0)


def test_gradients_that_are_not_finite_are_named() -> None:
    model = build("llama", layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(ThriftyError, match=r"the probe's signed_grad of .* is not finite: the loss overflows"):
        attach(model, "gps", budget=0.1, batches=batches(1, 4, 9))


@pytest.mark.parametrize("shape", [(7,), (5, 9), (3, 4, 5)])
@pytest.mark.parametrize("chunk", [1, 4, 2**20])
def test_entry_sums_are_sums(shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry_sums, "_CHUNK", chunk)
    sums, weight = EntrySums(shape), torch.randn(shape)
    assert not sums.any()
    assert torch.equal(sums.read(), torch.zeros(shape))
    gradients = [torch.randn(shape) for _ in range(3)]
    for gradient in gradients:
        sums.add(gradient, weight, STATISTICS["weight_times_grad"])
    assert sums.any()
    torch.testing.assert_close(sums.read(), sum((weight * g).abs() for g in gradients))


def test_entry_sums_of_bfloat16_are_float32() -> None:
    sums, one = EntrySums((3,)), torch.full((3,), 1.0, dtype=torch.bfloat16)
    for _ in range(300):  # in bfloat16 the sum would stop at 256
        sums.add(one, one, STATISTICS["abs_grad"])
    assert sums.read().tolist() == [300.0] * 3
