"""Low-rank pairs: a product with the same bits everywhere, a way back that is exact, and pairs beside other parts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import batches, build
from torch import Tensor, nn

from thrifty import attach
from thrifty.core.errors import ThriftyError
from thrifty.core.low_rank import LowRank
from thrifty.core.plan import Plan, plan_from_files, plan_to_files
from thrifty.delta import Delta, LowRankPiece
from thrifty.kernels.low_rank import add_product, subtract_product
from thrifty.update.tuning import Tuning

PAIRS = {"select": {"weights": {"target_modules": ["q_proj", "v_proj"]}}, "update": {"low_rank": {"r": 3, "alpha": 6}}}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def factors(rows: int, columns: int, *, size: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(shape, generator=generator, dtype=wide) for shape in ((rows, 4), (4, columns)))
    return left * size, right


def weight(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    values[0, :4] = torch.tensor([0.0, -0.0, 1e-30, -1e-30])
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_product_is_the_plain_one_rounded_once(dtype: torch.dtype) -> None:
    base, (left, right) = weight(600, 500, dtype), factors(600, 500, size=0.01, dtype=dtype)
    found = add_product(base, left, right, scale=0.5)
    expected = base.double() + 0.5 * left.double() @ right.double()
    assert found.dtype == dtype
    # float32 products and sums carry a few of its roundings
    slack = 2**-21 if left.dtype == torch.float32 else 2**-50
    unit = torch.finfo(dtype).eps
    assert ((found.double() - expected).abs() <= unit * expected.abs() + slack).all()
    one = torch.stack([base[i] for i in (7,)])
    assert torch.equal(add_product(one, left[7:8], right, scale=0.5), found[7:8])  # rows do not depend on each other
    back = subtract_product(found, left, right, scale=0.5)
    assert (back != base).float().mean() < 0.2


@pytest.mark.parametrize("size", [1e-6, 0.01, 30.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_piece_is_exact_both_ways(dtype: torch.dtype, size: float) -> None:
    base, (left, right) = weight(40, 70, dtype), factors(40, 70, size=size, dtype=dtype)
    piece = LowRankPiece.of(base, left, right, region=LowRank(4, 4.0))
    tensor = base.clone()
    piece.write_(tensor)
    assert torch.equal(tensor, add_product(base, left, right, scale=1.0))
    assert size < 1e-3 or not torch.equal(tensor, base)
    again = piece.base_of(tensor)
    assert again.view(torch.uint8).equal(base.view(torch.uint8))  # the sign of zero too


def test_at_the_size_of_a_fine_tuning_change_the_way_back_is_of_the_order_of_the_factors() -> None:
    base, (left, right) = weight(576, 576, torch.float32), factors(576, 576, size=0.005, dtype=torch.float32)
    assert 0.005 < (left @ right).std() < 0.02
    piece = LowRankPiece.of(base, left, right, region=LowRank(4, 4.0))
    assert len(piece.back) < 1.5 * 4 * (left.numel() + right.numel()) < 4 * base.numel() / 30


def test_a_damaged_piece_is_refused(tmp_path: Path) -> None:
    base, (left, right) = weight(40, 70, torch.float32), factors(40, 70, size=0.1, dtype=torch.float32)
    whole = LowRankPiece.of(base, left, right, region=LowRank(4, 4.0))
    cut = LowRankPiece.of(base, left, right, region=LowRank(4, 4.0)).back[:-20]
    for back in (cut, cut.flip(0)):
        broken = LowRankPiece(whole.region, whole.shape, whole.dtype, left, right, back, whole.fingerprint)
        with pytest.raises(ThriftyError, match="damaged"):
            broken.base_of(base)


def trained(
    family: str, method: object, *, dtype: torch.dtype = torch.float32, steps: int = 2
) -> tuple[nn.Module, Tuning]:
    model = build(family, dtype)
    tuning = attach(model, method, seed=1)  # type: ignore[arg-type]
    assert isinstance(tuning, Tuning)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2)
    for batch in batches(steps, 2, 8):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        tuning.check_gradients()
        optimizer.step()
    tuning.check_changed()
    return model, tuning


def test_the_model_starts_as_it_is_and_its_state_dict_holds_the_base() -> None:
    plain, model = build("llama"), build("llama")
    batch = batches(1, 2, 8)[0]
    tuning = attach(model, [PAIRS], seed=1)
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    model, tuning = trained("llama", [PAIRS])
    assert not torch.equal(model(**batch).logits, plain(**batch).logits)
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in state.items())
    with tuning.base():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert tuning.trainable_parameters == sum(p.numel() for p in tuning.parameters()) == 3 * 3 * (40 + 40 + 40 + 20)


def test_a_copy_trains_apart_and_a_cast_keeps_the_pair() -> None:
    model, tuning = trained("llama", [PAIRS])
    other, (batch,) = copy.deepcopy(model), batches(1, 2, 8, seed=5)
    leaves = [p for p in other.parameters() if p.requires_grad]
    other(**batch).loss.backward()
    assert all(p.grad is not None for p in leaves)
    before = model(**batch).logits
    torch.optim.SGD(leaves, lr=1.0).step()
    assert not torch.equal(other(**batch).logits, before)
    assert torch.equal(model(**batch).logits, before)
    values = [p.detach().clone() for p in tuning.parameters()]
    model.to(torch.bfloat16)
    assert all(torch.equal(p, v) and p.dtype == torch.float32 for p, v in zip(tuning.parameters(), values, strict=True))


def test_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model, tuning = trained("llama", [PAIRS])
        if checkpointing:
            model.gradient_checkpointing_enable()
        for p in tuning.parameters():
            p.grad = None
        model(**batches(1, 2, 8, seed=6)[0]).loss.backward()
        found.append([p.grad for p in tuning.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "weights",
    [
        {"select": {"weights": {"target_modules": ["c_attn"]}}, "update": {"low_rank": {"r": 3}}},
        {"select": {"tensors": {"target_modules": ["c_attn"], "only": "weights"}}},
        {"select": {"diagonal": {"blocks": 4, "target_modules": ["c_attn"]}}},
    ],
    ids=["pairs", "whole", "blocks"],
)
def test_weight_and_bias_of_one_module_in_two_parts(weights: object, dtype: torch.dtype) -> None:
    model, tuning = trained("gpt2", [weights, {"select": "biases"}], dtype=dtype)
    start = dict(build("gpt2", dtype).named_parameters())
    plan, delta = tuning.plan, tuning.delta()
    finished = dict(tuning.finish().named_parameters())
    assert {n for n, p in finished.items() if not torch.equal(p, start[n])} == set(plan)
    assert type(model.transformer.h[0].attn.c_attn) is type(build("gpt2").transformer.h[0].attn.c_attn)
    fresh = build("gpt2", dtype)
    assert all(torch.equal(p, finished[n]) for n, p in delta.apply(fresh).named_parameters())
    assert all(torch.equal(p, start[n]) for n, p in delta.remove(fresh).named_parameters())


def test_a_saved_delta_knows_its_base_and_removes_exactly(tmp_path: Path) -> None:
    _, tuning = trained("llama", [PAIRS], dtype=torch.bfloat16)
    tuning.delta().save(tmp_path / "delta")
    finished = tuning.finish()
    delta = Delta.load(tmp_path / "delta")
    with pytest.raises(ThriftyError, match="applied already"):
        delta.apply(finished)
    assert all(
        torch.equal(p, q)
        for p, q in zip(delta.remove(finished).parameters(), build("llama", torch.bfloat16).parameters(), strict=True)
    )
    with pytest.raises(ThriftyError, match="nothing to remove"):
        delta.remove(finished)


def test_the_plan_counts_prints_and_is_kept_in_files() -> None:
    tuning = attach(build("llama"), [PAIRS, {"select": "norms"}])
    text = str(tuning.plan)
    assert "low_rank r=3: 1,260 numbers in 6 tensors, layers 0-2" in text
    assert "whole: 280 numbers in 7 tensors, layers 0-2, others outside" in text
    again = plan_from_files(*plan_to_files(tuning.plan))
    assert dict(again) == dict(tuning.plan)
    assert isinstance(again, Plan)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"select": "weights", "update": {"low_rank": {}}}, "low_rank cannot train model.embed_tokens.weight"),
        ({"select": "norms", "update": "low_rank"}, "low_rank cannot train model.layers.0.input_layernorm.weight"),
        ({"select": "entries", "update": "low_rank"}, "low_rank trains whole matrices"),
        (PAIRS | {"update": {"low_rank": {"rank": 3}}}, "unknown option of low_rank: 'rank'"),
        (PAIRS | {"update": {"low_rank": 3}}, "options of low_rank must be a mapping"),
        (PAIRS | {"update": {"low_rank": {"r": 0}}}, "r 0 is not valid"),
        (PAIRS | {"update": {"low_rank": {"alpha": -1}}}, "alpha -1 is not valid"),
        (PAIRS | {"update": {"low_rank": {"r": 21}}}, "give a rank from 1 to 20"),
        (PAIRS | {"update": "lowrank"}, "did you mean 'low_rank'"),
    ],
    ids=str,
)
def test_mistakes_say_what_to_change(part: object, expected: str) -> None:
    model = build("llama")
    with pytest.raises(ThriftyError, match=expected):
        attach(model, [part])  # type: ignore[list-item]
    assert all(p.requires_grad for p in model.parameters())


def test_a_budget_is_checked() -> None:
    with pytest.raises(ThriftyError, match="lower r"):
        attach(build("llama"), [PAIRS], budget=1000)
