"""Selection without gradients: targets by name, block shapes, budgets, seeds, and what is refused."""

from __future__ import annotations

import pytest
import torch
from dense_probe import candidates
from families import FAMILIES, batches, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from thrifty import attach
from thrifty.core.budget import Budget
from thrifty.core.errors import ThriftyError
from thrifty.core.plan import Plan, kind_of
from thrifty.select.blocks import TopBlocks, auto_block_size
from thrifty.select.targets import targets


def random_plan(family: str = "llama", *, budget: float | int | str = 0.1, seed: int = 0, **options: object) -> Plan:
    return attach(build(family, layers=2), {"random_blocks": options}, budget=budget, seed=seed).plan


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_linear_and_stacked_expert_but_no_embedding(family: str) -> None:
    model = build(family)
    found = targets(model, "all-linear")
    assert {name: t.transposed for name, t in found.items()} == candidates(model)
    assert not {"lm_head.weight", "transformer.wpe.weight", "transformer.wte.weight"} & set(found)


@pytest.mark.parametrize("family", ["bert_classifier", "bert_encoder"])
def test_all_linear_leaves_the_embeddings_of_an_encoder_alone(family: str) -> None:
    assert not [name for name in targets(build(family), "all-linear") if "embedding" in name]


def test_a_list_matches_endings_and_full_names() -> None:
    model = build("llama", layers=2)
    assert list(targets(model, ["q_proj", "v_proj"])) == [
        f"model.layers.{i}.self_attn.{m}_proj.weight" for i in (0, 1) for m in "qv"
    ]
    assert list(targets(model, ("model.layers.1.mlp.up_proj",))) == ["model.layers.1.mlp.up_proj.weight"]
    assert list(targets(model, ["layers.1.mlp.up_proj"])) == ["model.layers.1.mlp.up_proj.weight"]


def test_a_string_is_a_regular_expression_on_the_whole_name() -> None:
    model = build("llama", layers=2)
    assert list(targets(model, r".*\.1\..*down_proj")) == ["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(ThriftyError, match="unknown module 'down_proj'"):  # a part of the name is not the whole
        targets(model, "down_proj")


def test_stacked_experts_are_named_as_parameters() -> None:
    assert list(targets(build("mixtral", layers=1), ["experts.down_proj"])) == ["model.layers.0.mlp.experts.down_proj"]


@pytest.mark.parametrize(("family", "name"), [("llama", "lm_head.weight"), ("gemma2", "model.embed_tokens.weight")])
def test_the_head_is_chosen_by_name_only(family: str, name: str) -> None:
    model = build(family)
    assert name not in targets(model, "all-linear")
    assert list(targets(model, ["lm_head"])) == [name]


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [
        (["q_prj"], "unknown module 'q_prj'; did you mean 'q_proj'"),
        (["q_proj", "nothing_like_it"], "unknown module 'nothing_like_it'"),
        ("q_prjo", "unknown module 'q_prjo'; did you mean 'q_proj'"),
        ("(q_proj", "is no regular expression"),
        ([], "is not valid; target_modules takes"),
        (3, "is not valid; target_modules takes"),
    ],
)
def test_what_matches_nothing_is_refused(target_modules: object, message: str) -> None:
    with pytest.raises(ThriftyError, match=message) as error:
        targets(build("llama", layers=1), target_modules)
    assert "\n" not in str(error.value)


def test_a_model_without_a_linear_layer_is_refused() -> None:
    with pytest.raises(ThriftyError, match="Sequential has no linear layer to select in; use method 'full'"):
        targets(nn.Sequential(nn.LayerNorm(3)), "all-linear")


@pytest.mark.parametrize(
    ("numbers", "size"), [(256 * 256**2, 256), (256 * 256**2 - 1, 128), (256 * 64**2, 64), (256 * 16**2, 16), (9, 16)]
)
def test_auto_is_the_largest_size_that_buys_256_blocks(numbers: int, size: int) -> None:
    assert auto_block_size(numbers) == size


def test_auto_is_the_default_block_size() -> None:
    model = nn.Module()
    model.wide = nn.Linear(1200, 900, bias=False)
    plan = TopBlocks(score="random").select(model, probe=None, budget=Budget.parse(256 * 32 * 32), seed=0)
    assert plan["wide.weight"].shape == (32, 32)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("scope", ["global", "per_kind", "per_matrix"])
@pytest.mark.parametrize("block_size", [4, 8, [3, 5], "column", "row"])
def test_a_budget_is_a_ceiling_of_which_nine_tenths_are_used(block_size: object, scope: str, family: str) -> None:
    total = sum(p.numel() for p in build(family, layers=2).parameters())
    for budget, ceiling in ((0.2, int(0.2 * total)), ("15%", int(0.15 * total)), (9000, 9000)):
        plan = random_plan(family, budget=budget, scope=scope, block_size=block_size)
        assert 0.9 * ceiling <= plan.trainable_parameters <= ceiling
        assert plan.trainable_parameters == sum(int(r.mask(plan.shapes[n]).sum()) for n, r in plan.items())
        assert plan.trainable_share == plan.trainable_parameters / total


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 4000), st.integers(1, 9), st.integers(1, 9), st.sampled_from(["global", "per_kind", "per_matrix"])
)
def test_a_budget_is_never_exceeded(budget: int, h: int, w: int, scope: str) -> None:
    model = nn.ModuleDict({"attn": nn.Linear(17, 13, bias=False), "mlp": nn.Linear(11, 29, bias=False)})
    selector, limit = TopBlocks(score="random", scope=scope, block_size=[h, w]), Budget.parse(budget)
    smallest = (13 % h or h) * (17 % w or w), (29 % h or h) * (11 % w or w)
    shares = (budget * 221 // 540, budget * 319 // 540) if scope == "per_kind" else (budget, budget)
    if not any(share >= size for share, size in zip(shares, smallest, strict=True)):
        with pytest.raises(ThriftyError, match="buys no block"):
            selector.select(model, probe=None, budget=limit, seed=budget)
        return
    plan = selector.select(model, probe=None, budget=limit, seed=budget)
    assert 0 < plan.trainable_parameters <= budget
    left = min(budget, 17 * 13 + 11 * 29) - plan.trainable_parameters
    assert left < h * w * (1 if scope == "global" else 2)  # what is left buys no block, in either kind


def test_random_blocks_follow_the_seed() -> None:
    plans = [random_plan(seed=seed, block_size=8) for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


def test_random_blocks_are_equally_likely() -> None:
    hits = torch.zeros(6, 6)
    model = nn.ModuleDict({"a": nn.Linear(12, 12, bias=False)})
    for seed in range(300):
        plan = TopBlocks(score="random", block_size=2).select(model, probe=None, budget=Budget.parse(48), seed=seed)
        hits[plan["a.weight"].index.unbind(1)] += 1
    assert hits.sum() == 300 * 12
    assert hits.min() > 60  # 100 expected of each
    assert hits.max() < 140


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "abs_grd"}, "unknown score 'abs_grd'; did you mean 'abs_grad'"),
        ({"scope": "per_kinds"}, "unknown scope 'per_kinds'; did you mean 'per_kind'"),
        ({"block_size": 0}, "block_size 0 is not valid: give 'auto'"),
        ({"block_size": "64x64"}, "block_size '64x64' is not valid"),
        ({"block_size": [4, 4, 4]}, "block_size .* is not valid"),
        ({"block_size": True}, "block_size True is not valid"),
        ({"block_sise": 4}, "'block_sise'; did you mean 'block_size'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_runs(options: dict, message: str) -> None:
    with pytest.raises(ThriftyError, match=message) as error:
        attach(build("llama", layers=1), {"smt": options}, batches=batches(1, 2, 8))
    assert "\n" not in str(error.value)


def test_a_scope_that_splits_the_budget_into_nothing_says_so() -> None:
    model = nn.ModuleDict({"attn": nn.Linear(8, 8, bias=False), "mlp": nn.Linear(8, 8, bias=False)})
    with pytest.raises(ThriftyError, match=r"split by scope 'per_kind', buys no block: .*'global'"):
        TopBlocks(score="random", scope="per_kind", block_size=8).select(
            model, probe=None, budget=Budget.parse(64), seed=0
        )


def test_kinds() -> None:
    assert kind_of("model.layers.0.self_attn.q_proj.weight") == "attention"
    assert kind_of("transformer.h.0.mlp.c_proj.weight") == "mlp"
    assert kind_of("model.layers.0.mlp.experts.down_proj") == "mlp"
    assert kind_of("lm_head.weight") == "other"
    assert {kind_of(n) for n in targets(build("bert_classifier"), "all-linear") if ".attention." not in n} >= {"mlp"}


def test_a_plan_prints_what_it_trains() -> None:
    text = str(random_plan("gpt2", budget="10%", block_size=8))
    assert "3,136 of 31,704 numbers trained (9.89%)" in text
    assert "by kind:" in text
    assert "by layer: 0:" in text
