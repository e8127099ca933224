"""Whole tensors, layer ranges, diagonals, and several parts composed to one plan."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from families import FAMILIES, batches, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from thrifty import attach
from thrifty.core.budget import Budget, distinct_parameters
from thrifty.core.errors import ThriftyError
from thrifty.core.method import parse_method
from thrifty.core.plan import Plan
from thrifty.core.region import Whole
from thrifty.select import compose as room
from thrifty.select.diagonal import Diagonal
from thrifty.select.layers import in_layers, layer_of
from thrifty.select.tensors import Tensors

NAMES = ["wte.weight", *(f"h.{i}.{m}.weight" for i in range(5) for m in ("attn", "mlp")), "ln_f.weight"]


def tensors(model: nn.Module, *, budget: Any = None, **options: Any) -> Plan:
    selector, limit = Tensors(**options), None if budget is None else Budget.parse(budget)
    selector.check(model, limit)
    return selector.select(model, probe=None, budget=limit, seed=0)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (0, [0]),
        (-1, [4]),
        ("3", [3]),
        ("-2", [3]),
        ("middle", [2]),
        ("1:3", [1, 2]),
        (" -2 : ", [3, 4]),
        (":-4", [0]),
        (":", [0, 1, 2, 3, 4]),
        ("0:5", [0, 1, 2, 3, 4]),
        ([0, "3:", "middle", 0], [0, 2, 3, 4]),
    ],
)
def test_layers_are_counted_as_python_does(layers: Any, expected: list[int]) -> None:
    assert in_layers(NAMES, layers) == {name for name in NAMES if layer_of(name) in expected}
    assert in_layers(NAMES, None) == set(NAMES)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (5, "layer 5 lies outside the model: the model has layers 0 to 4"),
        (-6, "layer -6 lies outside the model"),
        ("2:6", "layers '2:6' reaches outside the model: the model has layers 0 to 4"),
        ("-6:", "reaches outside the model"),
        ("3:3", "layers '3:3' is empty"),
        ("4:1", "layers '4:1' is empty"),
        ("top", "layers 'top' is not valid: give a number, a range such as '4:8'"),
        ("1:2:3", "is not valid"),
        (1.5, "layers 1.5 is not valid"),
        (True, "layers True is not valid"),
        ([0, None], "layers None is not valid"),
    ],
)
def test_a_layer_that_is_not_there_is_refused(layers: Any, message: str) -> None:
    with pytest.raises(ThriftyError, match=message):
        in_layers(NAMES, layers)


def test_a_model_without_layers_says_so() -> None:
    for layers in (0, "middle", "0:1"):
        with pytest.raises(ThriftyError, match=r"the model has no numbered layers|is not valid"):
            in_layers(["embedding.weight"], layers)


@pytest.mark.parametrize(
    ("method", "options"),
    [("gps", {"layers": "1:9"}), ("diablo", {"layers": [0, 2]}), ("telly", {"freeze": 3}), ("locft_bf", {"layer": 9})],
)
def test_every_method_refuses_a_layer_outside_the_model(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(ThriftyError, match=r"outside the model: the model has layers 0 to 1|is empty") as error:
        attach(build("llama", layers=2), {method: options}, batches=batches(1, 2, 8))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_biases_and_norms_are_all_there_is(family: str) -> None:
    model = build(family, layers=2)
    sorts = {"weights": (False, True), "biases": (True, False), "norms": (False, False)}
    if family not in ("qwen2", "gpt2"):
        with pytest.raises(ThriftyError, match="has no tensor with only 'biases'"):
            tensors(model, only="biases")
        del sorts["biases"]
    found: list[str] = []
    for only, sort in sorts.items():
        plan = tensors(model, only=only)
        assert all(isinstance(region, Whole) for region in plan.values())
        assert {("bias" in n.rsplit(".", 1)[-1], model.get_parameter(n).ndim > 1) for n in plan} == {sort}
        found += plan
    assert sorted(found) == sorted(n for n, _ in model.named_parameters())
    assert tensors(model).trainable_parameters == distinct_parameters(model)


def test_biases_of_stacked_experts_are_biases() -> None:
    model = nn.Module()
    model.experts = nn.ParameterDict({"down_proj": torch.zeros(4, 5, 6), "down_proj_bias": torch.zeros(4, 5)})
    assert list(tensors(model, only="biases")) == ["experts.down_proj_bias"]
    assert list(tensors(model, only="weights")) == ["experts.down_proj"]


def test_modules_are_named_by_ending_by_pattern_and_as_groups() -> None:
    model = build("llama", layers=2)
    assert list(tensors(model, target_modules=["layers.1.mlp"])) == [
        f"model.layers.1.mlp.{m}_proj.weight" for m in ("gate", "up", "down")
    ]
    assert list(tensors(model, target_modules=r".*0\.self_attn\.q_proj")) == ["model.layers.0.self_attn.q_proj.weight"]
    assert list(tensors(model, target_modules=["mlp"], layers=-1)) == list(
        tensors(model, target_modules=["layers.1.mlp"])
    )
    assert list(tensors(model, target_modules=["lm_head"])) == ["lm_head.weight"]


def test_a_tied_head_is_found_by_its_own_name() -> None:
    assert list(tensors(build("gemma2", layers=1), target_modules=["lm_head"])) == ["model.embed_tokens.weight"]


def test_after_the_layers_come_the_norm_and_an_untied_head() -> None:
    after = {
        "llama": ["model.norm.weight", "lm_head.weight"],
        "gemma2": ["model.norm.weight"],
        "gpt2": ["transformer.ln_f.weight", "transformer.ln_f.bias"],
    }
    for family, expected in after.items():
        plan = tensors(build(family, layers=2), layers="1:", after=True)
        assert [n for n in plan if layer_of(n) != 1] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": "bias"}, "unknown only 'bias'; did you mean 'biases'"),
        ({"only": "biases"}, "has no tensor with only 'biases': choose more modules or layers"),
        ({"only": "norms", "target_modules": ["mlp"]}, r"has no tensor with target_modules \['mlp'\], only 'norms'"),
        ({"target_modules": ["mpl"]}, "unknown module 'mpl'; did you mean 'mlp'"),
        ({"target_modules": "mpl"}, "unknown module 'mpl'"),
        ({"target_modules": "("}, r"'\(' is no regular expression"),
        ({"target_modules": 3}, "target_modules: 3 is not valid: give a list"),
        ({"target_modules": ["mlp", 3]}, "is not valid: give a list"),
        ({"layers": "0:5"}, "reaches outside the model"),
        ({"budget": 100}, "more than budget 100 numbers allows .*, or remove budget"),
    ],
)
def test_tensors_that_are_not_there_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ThriftyError, match=message) as error:
        tensors(build("llama", layers=2), **options)
    assert "\n" not in str(error.value)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 35))
def test_diagonals_of_any_shape(out: int, columns: int, blocks: int) -> None:
    model = nn.ModuleDict({"a": nn.Linear(columns, out, bias=False)})
    mask = Diagonal(blocks=blocks).select(model, probe=None, budget=None, seed=0)["a.weight"].mask((out, columns))
    h, w = math.ceil(out / blocks), math.ceil(columns / blocks)
    expected = [[i // h == j // w for j in range(columns)] for i in range(out)]
    assert mask.tolist() == expected
    assert mask.sum() >= min(out, columns)


def test_diagonals_of_stacked_experts_lie_in_each_expert() -> None:
    model = nn.Module()
    model.experts = nn.ParameterDict({"down_proj": torch.zeros(3, 5, 7)})
    plan = Diagonal(blocks=4).select(model, probe=None, budget=None, seed=0)
    mask = plan["experts.down_proj"].mask((3, 5, 7))
    assert mask.any(-1).any(-1).all()
    assert torch.equal(mask[0], mask[1])
    assert torch.equal(mask[0], mask[2])
    assert mask[0].tolist() == [[i // 2 == j // 2 for j in range(7)] for i in range(5)]


@pytest.mark.parametrize("blocks", [0, -1, True, 2.0, "8"])
def test_a_count_of_blocks_that_makes_no_sense_is_refused(blocks: Any) -> None:
    with pytest.raises(ThriftyError, match=r"blocks .* is not valid: give how many lie on the diagonal"):
        Diagonal(blocks=blocks)


def test_diagonals_above_a_budget_are_refused() -> None:
    with pytest.raises(ThriftyError, match=r"the diagonals hold .*: raise blocks \(now 2\), or remove budget"):
        attach(build("llama", layers=1), {"diablo": {"blocks": 2}}, budget=0.05)


ROWS = {"select": {"rows": {"target_modules": ["up_proj"]}}}
BLOCKS = {"select": {"blocks": {"block_size": 4, "target_modules": ["q_proj", "v_proj"]}}}
NORMS = {"select": "norms"}


def composed(parts: list[dict[str, Any]], *, budget: Any = None) -> Plan:
    return attach(build("llama", layers=2), parts, budget=budget, batches=batches(1, 4, 9)).plan


def test_parts_share_what_the_others_leave() -> None:
    model = build("llama", layers=2)
    total, norms = distinct_parameters(model), tensors(model, only="norms").trainable_parameters
    limit = int(0.1 * total)
    plan = composed([BLOCKS, ROWS, NORMS], budget=0.1)
    share = (limit - norms) // 2
    sizes = {key: sum(n for name, n in plan.sizes.items() if key in name) for key in ("self_attn", "mlp", "norm")}
    assert sizes["norm"] == norms
    assert share - 16 < sizes["self_attn"] <= share  # a block of 16
    assert share - 40 < sizes["mlp"] <= share  # a row of 40
    assert plan.trainable_parameters <= limit
    own = composed([BLOCKS | {"budget": 320}, ROWS, NORMS], budget=0.1)
    assert sum(n for name, n in own.sizes.items() if "self_attn" in name) == 320
    assert sum(n for name, n in own.sizes.items() if "mlp" in name) > sizes["mlp"]


def test_parts_that_train_one_tensor_are_named() -> None:
    both = [BLOCKS, {"select": {"columns": {"target_modules": ["k_proj", "v_proj"]}}}]
    with pytest.raises(ThriftyError, match=r"parts 1 and 2 of method 'custom' both train .*[qv]_proj.weight: .*layers"):
        composed(both, budget=0.9)
    both[1]["select"]["columns"]["layers"] = 1  # type: ignore[index]
    both[0] = {"select": {"blocks": {"block_size": 4, "target_modules": ["v_proj"], "layers": 0}}}
    assert composed(both, budget=0.1)


@pytest.mark.parametrize(
    ("parts", "budget", "message"),
    [
        (
            [BLOCKS, NORMS],
            201,
            r"budget 201 numbers .* is too small: the parts of fixed size hold 200; .* at least 202",
        ),
        ([BLOCKS | {"budget": 900}, ROWS], 500, "too small: .*lower the budgets of the parts"),
        ([BLOCKS, ROWS], 30, "budget 15 numbers .* buys no block"),
        ([BLOCKS, {"select": {"rows": {"layers": 9}}}], 0.1, "layer 9 lies outside the model"),
    ],
)
def test_budgets_of_parts_that_do_not_add_up(parts: list[dict[str, Any]], budget: Any, message: str) -> None:
    with pytest.raises(ThriftyError, match=message) as error:
        composed(parts, budget=budget)
    assert "\n" not in str(error.value)


def passes(monkeypatch: pytest.MonkeyPatch, parts: list[dict[str, Any]]) -> list[set[str]]:
    """What each pass of the probe collected; every pass must have seen all the data."""
    asked: list[set[str]] = []
    real = room.run_probe

    def counted(model: nn.Module, data: Iterable[Any], **options: Any) -> Any:
        probe = real(model, data, **options)
        assert probe.units == 2
        asked.append(set(options["statistics"]))
        return probe

    monkeypatch.setattr(room, "run_probe", counted)
    data = batches(2, 4, 9)
    model, method = build("llama", layers=2), parse_method(parts)
    room.compose(method, model, Budget.parse(0.1), batches=(batch for batch in data), seed=0)
    return asked


def test_one_pass_for_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"select": {"entries": {"score": "squared_grad", "target_modules": ["down_proj"]}}}
    assert passes(monkeypatch, [BLOCKS, ROWS, entries, NORMS]) == [{"abs_grad", "squared_grad"}]
    assert passes(monkeypatch, [NORMS]) == []


def test_two_cuts_of_one_matrix_are_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"select": {"blocks": {"block_size": 4, "target_modules": ["up_proj"]}}, "budget": 16}
    rows = {"select": {"rows": {"target_modules": ["up_proj", "down_proj"]}}, "budget": 40}
    seen: list[set[str]] = []
    monkeypatch.setattr(room, "run_probe", _noting(seen, room.run_probe))
    with pytest.raises(ThriftyError, match="parts 1 and 2 of method 'custom' both train"):
        composed([free, rows | {"budget": 4000}])
    assert seen == [{"model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"}, seen[1]]
    assert len(seen[1]) == 4


def _noting(seen: list[set[str]], real: Any) -> Any:
    def noted(*args: Any, **options: Any) -> Any:
        seen.append(set(options["grids"]))
        return real(*args, **options)

    return noted
