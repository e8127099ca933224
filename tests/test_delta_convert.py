"""Deltas to PEFT's adapters and back: read by stock PEFT, with the logits that the numbers say."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batches, build
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from thrifty import attach
from thrifty.core.errors import ThriftyError
from thrifty.core.low_rank import LowRank
from thrifty.delta import Delta, LowRankPiece, NewTokens
from thrifty.delta.adapter import adapter_difference
from thrifty.delta.diff import diff
from thrifty.delta.from_peft import from_adapter
from thrifty.delta.shira import save_shira
from thrifty.delta.to_peft import save_lora, to_lora

(BATCH,) = batches(1, 2, 12)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MATRICES = {"llama": PROJECTIONS, "qwen2": PROJECTIONS, "gemma2": PROJECTIONS, "gpt2": ("c_attn", "c_proj", "c_fc")}
PREFIX = "base_model.model."


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=BATCH["input_ids"]).logits


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: p.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, p in model.named_parameters()}


def moved(base: nn.Module, *, only: tuple[str, ...] = (), size: float = 0.05, seed: int = 1) -> Delta:
    """Every tensor, or those whose module is named, moved a little."""
    generator = torch.Generator().manual_seed(seed)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    after = dict(before)
    for name, tensor in before.items():
        if not only or (name.endswith("weight") and name.split(".")[-2] in only):
            noise = size * torch.randn(tensor.shape, generator=generator)
            after[name] = (tensor + noise.to(tensor.dtype)).detach()
    return diff(before, after)


def blocks(base: nn.Module, **options: Any) -> Delta:
    """Some blocks of a copy trained away from `base`."""
    model = copy.deepcopy(base)
    tuning = attach(model, {"random_blocks": {"block_size": 8} | options}, budget=0.05)
    for leaf in tuning.parameters():
        leaf.data.add_(0.1 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(3)))
    tuning.sync()
    return tuning.delta()


def by_peft(base: nn.Module, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(copy.deepcopy(base), str(folder))


def applied(base: nn.Module, delta: Delta) -> nn.Module:
    return delta.apply(copy.deepcopy(base))


class Two(nn.Module):
    """A linear layer and one that stores its matrix the other way round."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(columns, rows, bias=False), Conv1D(rows, columns)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.floats(0, 0.9), st.integers(0, 99))
def test_the_change_is_the_nearest_of_its_rank(rows: int, columns: int, rank: int, error: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = Two(rows, columns)
    delta = moved(model, only=("one", "other"), seed=seed)
    weights = {"one": delta.pieces["one.weight"].change(), "other": delta.pieces["other.weight"].change().T}
    fixed, least = to_lora(delta, model, rank=rank), to_lora(delta, model, error=error)
    for name, change in weights.items():
        change = change.reshape(rows, columns)
        values = torch.linalg.svdvals(change)
        left_out = [float(values[k:].norm() / values.norm()) for k in range(len(values) + 1)]
        b, a = (fixed.state[f"{PREFIX}{name}.lora_{end}.weight"].double() for end in "BA")
        assert (b.shape, a.shape) == ((rows, rank), (rank, columns))
        off = float((change - b @ a).norm() / change.norm())
        assert off == pytest.approx(left_out[min(rank, len(values))], abs=1e-5)
        assert fixed.errors[name] == pytest.approx(off, abs=1e-9)
        took = len(least.state[f"{PREFIX}{name}.lora_A.weight"])
        assert left_out[took] <= error + 1e-5
        assert took == 1 or left_out[took - 1] > error - 1e-5
        assert least.errors[name] <= error + 1e-5
    assert min(fixed.errors.values()) - 1e-12 <= fixed.error <= max(fixed.errors.values()) + 1e-12


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2"])
@pytest.mark.parametrize("everything", [False, True], ids=["matrices", "everything"])
def test_stock_peft_computes_with_the_truncated_change(family: str, everything: bool, tmp_path: Path) -> None:
    base = build(family)
    delta = moved(base, only=() if everything else MATRICES[family])
    before = bits(base)
    adapter = save_lora(delta, tmp_path / "few", base, rank=3)
    save_lora(delta, tmp_path / "all", base, rank=200)
    assert bits(base) == before
    torch.testing.assert_close(
        logits(by_peft(base, tmp_path / "all")), logits(applied(base, delta)), rtol=1e-4, atol=1e-4
    )
    by_hand = copy.deepcopy(base)
    for key, tensor in load_file(tmp_path / "few" / "adapter_model.safetensors").items():
        name, _, end = key.removeprefix(PREFIX).rpartition(".")
        if end == "bias" and name.endswith(".lora_B"):
            by_hand.get_submodule(name.removesuffix(".lora_B")).bias.data.add_(tensor)
        elif name.endswith(".lora_A"):
            module = by_hand.get_submodule(name.removesuffix(".lora_A"))
            product = adapter.state[key.replace("lora_A", "lora_B")] @ tensor
            module.weight.data.add_(product.T if isinstance(module, Conv1D) else product)
        elif not name.endswith(".lora_B"):
            by_hand.get_submodule(name).get_parameter(end).data.copy_(tensor)
    torch.testing.assert_close(logits(by_peft(base, tmp_path / "few")), logits(by_hand), rtol=1e-4, atol=1e-4)
    assert 0.1 < adapter.error < 1
    expected = adapter_difference(delta, tmp_path / "few", base)
    assert expected == pytest.approx(float((logits(by_hand) - logits(applied(base, delta))).abs().max()), rel=2)
    assert bits(base) == before


def test_one_rank_gives_a_plain_configuration(tmp_path: Path) -> None:
    base = build("llama")
    save_lora(moved(base, only=PROJECTIONS), tmp_path / "a", base, rank=32, base_model="some/base")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "inference_mode": True,
        "r": 32,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(PROJECTIONS),
        "fan_in_fan_out": False,
    }
    shapes = {k: tuple(t.shape) for k, t in load_file(tmp_path / "a" / "adapter_model.safetensors").items()}
    assert all(32 in shape for shape in shapes.values())  # also of k_proj, which has 20 rows
    assert len(shapes) == 2 * 3 * len(PROJECTIONS)


def test_an_error_gives_each_module_its_own_rank(tmp_path: Path) -> None:
    base = build("llama")
    adapter = save_lora(moved(base, only=("k_proj", "up_proj")), tmp_path / "a", base, error=0.3)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    ranks = {n.removeprefix(PREFIX): len(t) for n, t in adapter.state.items() if "lora_A" in n}
    assert len(set(ranks.values())) > 1
    patterns = {f"{name}.lora_A.weight": rank for name, rank in config["rank_pattern"].items()}
    assert {name: patterns.get(name, config["r"]) for name in ranks} == ranks
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert 0.2 < adapter.error <= 0.3
    loaded = by_peft(base, tmp_path / "a")
    for name, rank in ranks.items():
        layer = loaded.get_submodule(PREFIX + name.removesuffix(".lora_A.weight"))
        assert (layer.r["default"], layer.scaling["default"]) == (rank, 1.0)


def test_untouched_modules_are_no_targets(tmp_path: Path) -> None:
    base = build("llama")
    name = "model.layers.1.self_attn.q_proj"
    delta = blocks(base, target_modules=[name])
    adapter = save_lora(delta, tmp_path / "a", base, rank=40)
    assert adapter.config["target_modules"] == [name]
    torch.testing.assert_close(
        logits(by_peft(base, tmp_path / "a")), logits(applied(base, delta)), rtol=1e-4, atol=1e-4
    )
    rows = delta.plan[f"{name}.weight"].mask((40, 40)).any(1)
    assert not adapter.state[f"{PREFIX}{name}.lora_B.weight"][~rows].any()


@pytest.mark.parametrize("module", ["model.layers.0.mlp.up_proj", "transformer.h.0.mlp.c_fc"])
def test_a_low_rank_pair_is_taken_over_as_it_is(module: str) -> None:
    base = build("gpt2" if "transformer" in module else "llama")
    weight = base.get_submodule(module).weight
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator) for shape in ((weight.shape[0], 3), (3, weight.shape[1])))
    piece = LowRankPiece.of(weight, left, right, region=LowRank(3, 6.0))
    delta = Delta({f"{module}.weight": piece}, method={}, total=1)
    for options in ({"rank": 5}, {"error": 0.0}):
        adapter = to_lora(delta, base, **options)
        b, a = (adapter.state[f"{PREFIX}{module}.lora_{end}.weight"] for end in "BA")
        own = (right.T, 2 * left.T) if "c_fc" in module else (2 * left, right)
        assert adapter.error < 1e-6
        assert not b[:, 3:].any()
        torch.testing.assert_close(b[:, :3] @ a[:3], own[0] @ own[1], rtol=1e-6, atol=1e-6)
        assert torch.equal(a[:3], own[1]) or torch.equal(a[:3], left.T)
    assert to_lora(delta, base, rank=1).error > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_on_a_bfloat16_base(family: str, tmp_path: Path) -> None:
    base = build(family, torch.bfloat16)
    delta = moved(base, only=MATRICES[family], size=0.1)
    save_lora(delta, tmp_path / "a", base, rank=40)
    largest = float((logits(applied(base, delta)) - logits(base)).abs().max())
    assert adapter_difference(delta, tmp_path / "a", base) < 0.1 * largest


def refused(call: Any, message: str) -> None:
    with pytest.raises(ThriftyError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_what_lora_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    base = build("llama", layers=1)
    delta = moved(base, only=("q_proj",))
    refused(lambda: to_lora(delta, base), "either a rank, such as 16, or an error")
    refused(lambda: to_lora(delta, base, rank=4, error=0.1), "either a rank")
    refused(lambda: to_lora(delta, base, rank=0), "rank 0 is not valid")
    refused(lambda: to_lora(delta, base, error=1.0), "error 1 is not valid")
    refused(lambda: to_lora(delta, build("llama", layers=1, seed=5), rank=4), "q_proj.weight differs from the base")
    refused(lambda: to_lora(delta, build("gpt2", layers=1), rank=4), "the model has no tensor")
    refused(
        lambda: to_lora(moved(base, only=("norm",)), base, rank=4), "model.norm.weight is no matrix of a linear layer"
    )
    delta.new_tokens = NewTokens(ids={"<a>": 97}, base_rows=97, rows=98)
    refused(lambda: to_lora(delta, base, rank=4), "adds tokens")
    delta.new_tokens = None
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("years")
    refused(lambda: save_lora(delta, tmp_path / "used", base, rank=4), "exists and is not empty")
    assert (tmp_path / "used" / "thesis.tex").read_text() == "years"


def test_stacked_experts_are_stored_whole(tmp_path: Path) -> None:
    base = build("mixtral", layers=1)
    delta = moved(base)
    adapter = save_lora(delta, tmp_path / "a", base, rank=40)
    assert "model.layers.0.mlp.experts" in adapter.config["modules_to_save"]
    torch.testing.assert_close(
        logits(by_peft(base, tmp_path / "a")), logits(applied(base, delta)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shira_holds_blocks_of_linear_layers(dtype: torch.dtype, tmp_path: Path) -> None:
    base = build("llama", dtype)
    delta = blocks(base)
    before = bits(base)
    r = save_shira(delta, tmp_path / "a", base)
    assert bits(base) == before
    state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    shapes = {n: base.get_parameter(n).shape for n in delta.pieces}
    assert {n: len(state[f"{PREFIX}{n.removesuffix('.weight')}.shira_weight"]) for n in shapes} == {
        n: r * sum(shape) for n, shape in shapes.items()
    }
    torch.testing.assert_close(
        logits(by_peft(base, tmp_path / "a")), logits(applied(base, delta)), rtol=1e-5, atol=1e-5
    )
    assert adapter_difference(delta, tmp_path / "a", base) < 1e-4
    loaded = by_peft(base, tmp_path / "a").merge_and_unload()
    outside = {n: ~delta.plan[n].mask(shape) for n, shape in shapes.items()}
    for name, mask in outside.items():
        assert torch.equal(loaded.get_parameter(name)[mask], base.get_parameter(name)[mask])


def test_what_shira_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    base = build("llama", layers=1)
    refused(lambda: save_shira(moved(base, only=("norm",)), tmp_path / "a", base), "model.norm.weight is none")
    refused(
        lambda: save_shira(moved(base, only=("k_proj",)), tmp_path / "a", base), "has no .* entries: convert to LoRA"
    )
    other = build("gpt2", layers=1)
    refused(lambda: save_shira(blocks(other), tmp_path / "a", other), "SHiRA changes weights of linear layers only")


def peft_model(base: nn.Module, config: Any) -> Any:
    """PEFT's adapter on a copy, every trained number drawn anew."""
    torch.manual_seed(0)
    wrapped = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return wrapped.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_lora_becomes_low_rank_pairs(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = build(family, dtype)
    before = bits(base)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(MATRICES[family])[:2], rank_pattern={"c_proj": 2})
    wrapped = peft_model(base, config)
    wrapped.save_pretrained(tmp_path / "a")
    delta = from_adapter(tmp_path / "a", base)
    assert bits(base) == before
    assert {type(piece) for piece in delta.pieces.values()} == {LowRankPiece}
    assert len(delta.pieces) == (9 if family == "gpt2" else 6)
    assert delta.method == {"peft": {"peft_type": "LORA"}}
    close = 1e-4 if dtype == torch.float32 else 0.5
    assert 0 <= delta.info["logit_difference"] < close
    torch.testing.assert_close(logits(applied(base, delta)), logits(wrapped), rtol=close, atol=close)
    delta.save(tmp_path / "d")
    model = copy.deepcopy(base)
    Delta.load(tmp_path / "d").apply(model)
    Delta.load(tmp_path / "d").remove(model)
    assert bits(model) == before


OTHERS = {
    "dora": {"peft_type": "LORA", "use_dora": True, "r": 4},
    "lora_with_bias": {"peft_type": "LORA", "r": 4, "bias": "all", "target_modules": ["q_proj", "v_proj"]},
    "lora_and_a_norm": {"peft_type": "LORA", "r": 4, "modules_to_save": ["norm"]},
    "pissa": {"peft_type": "LORA", "r": 4, "init_lora_weights": "pissa"},
    "large_rank": {"peft_type": "LORA", "r": 30, "target_modules": ["k_proj"]},
    "loha": {"peft_type": "LOHA", "r": 2, "alpha": 2},
    "ia3": {"peft_type": "IA3", "feedforward_modules": ["v_proj"]},
    "oft": {"peft_type": "OFT", "oft_block_size": 4, "r": 0},
    "shira": {"peft_type": "SHIRA", "r": 3},
    "tokens": {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 3], "target_modules": ["embed_tokens"]},
}
REGIONS = {"shira": "entries", "tokens": "blocks"}  # else whole tensors


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_become_what_their_merge_writes(kind: str, tmp_path: Path) -> None:
    from peft import get_peft_config

    base = build("qwen2", layers=2)
    before = bits(base)
    wrapped = peft_model(base, get_peft_config({"target_modules": ["q_proj", "v_proj"]} | OTHERS[kind]))
    wrapped.save_pretrained(tmp_path / "a")
    delta = from_adapter(str(tmp_path / "a"), base)
    assert bits(base) == before
    assert delta.info["logit_difference"] < 1e-3
    assert {region.kind for region in delta.plan.values()} == {REGIONS.get(kind, "whole")}
    merged = by_peft(base, tmp_path / "a").merge_and_unload()
    assert bits(applied(base, delta)) == {name: bits(merged)[name] for name in before}
    torch.testing.assert_close(logits(applied(base, delta)), logits(wrapped), rtol=1e-3, atol=1e-3)


def test_a_delta_of_a_peft_method(tmp_path: Path) -> None:
    base = build("llama", layers=1)
    tuning = attach(copy.deepcopy(base), {"peft": {"r": 2, "target_modules": ["q_proj"]}})
    for leaf in tuning.parameters():
        leaf.data.add_(0.1)
    tuning.delta().save(tmp_path / "d")
    for adapter in (tuning.delta(), tmp_path / "d", tmp_path / "d" / "adapter"):
        delta = from_adapter(adapter, base)
        torch.testing.assert_close(logits(applied(base, delta)), logits(tuning.model))
    refused(
        lambda: from_adapter(tuning.delta(), build("llama", layers=1, seed=5)), "differs from the base of this adapter"
    )
    refused(lambda: to_lora(tuning.delta(), base, rank=2), "is a PEFT adapter already")


def test_to_lora_and_back(tmp_path: Path) -> None:
    base = build("llama", layers=1)
    delta = moved(base, only=("q_proj", "down_proj"))
    save_lora(delta, tmp_path / "a", base, rank=5)
    again = from_adapter(tmp_path / "a", base)
    assert list(again.pieces) == list(delta.pieces)
    assert all(piece.region.r == 5 for piece in again.pieces.values())
    adapter = to_lora(again, base, rank=5)
    for key, tensor in load_file(tmp_path / "a" / "adapter_model.safetensors").items():
        assert torch.equal(adapter.state[key], tensor)


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base = build("llama", layers=1)
    wrapped = peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "a")
    refused(lambda: from_adapter(tmp_path / "a", build("gpt2", layers=1)), "PEFT cannot put this LORA adapter")
    refused(lambda: from_adapter(tmp_path / "none", base), "is no PEFT adapter: it holds no adapter_config.json")
    file = tmp_path / "a" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    refused(lambda: from_adapter(tmp_path / "a", base), "is damaged or incomplete")
    file.unlink()
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"pickle")
    refused(lambda: from_adapter(tmp_path / "a", base), "adapter_model.bin is a pickle, which can run any code")
    deeper = peft_model(build("llama", layers=2), LoraConfig(r=2, target_modules=["q_proj"]))
    deeper.save_pretrained(tmp_path / "b")
    refused(lambda: from_adapter(tmp_path / "b", base), "the adapter holds .*layers.1.*: it is of another model")
    refused(lambda: from_adapter(tmp_path / "b", build("llama", layers=3)), "the adapter lacks .*layers.2")
    fresh = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"]))
    fresh.save_pretrained(tmp_path / "c")
    refused(lambda: from_adapter(tmp_path / "c", base), "changes nothing")
    tuning = attach(copy.deepcopy(base), {"peft": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}})
    refused(lambda: from_adapter(tuning.delta(), base), "PROMPT_TUNING adds virtual tokens")
