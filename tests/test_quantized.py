"""Training on a quantized base: gradients against a dense twin, blocks taken out, deltas, plain checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import batches
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from thrifty.core.budget import Budget
from thrifty.core.errors import ThriftyError
from thrifty.core.method import parse_method
from thrifty.core.quantized import QuantizedLinear, dequantized, give_gradients, is_quantized, stored_bytes
from thrifty.delta import Delta
from thrifty.select.compose import compose
from thrifty.update.quantize import FORMS, apply_quantized, packed_bytes, plain, quantize
from thrifty.update.quantized import PatchedLinear
from thrifty.update.tuning import attach

pytest.importorskip("torchao")

BATCHES = batches(3, 4, 12)
METHODS: dict[str, Any] = {
    "smt": {"smt": {"block_size": 8, "scope": "per_matrix"}},
    "random": {"random_blocks": {"block_size": [5, 12]}},
    "columns": {"smt": {"block_size": "column", "score": "weight_times_grad"}},
    "rows": {"random_rows": {}},
    "diablo": {"diablo": {"blocks": 16}},
}


def config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "attention_bias": True,
            "pad_token_id": 0,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, two shards of float32."""
    place = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = LlamaForCausalLM(config())
    for p in model.parameters():
        p.data = 0.15 * torch.randn_like(p) if p.ndim > 1 else p.data + 0.1 * torch.randn_like(p)
    model.save_pretrained(place, max_shard_size="200KB")
    return place


def load(folder: Path, form: str | None, dtype: torch.dtype = torch.float32) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    if form is not None:
        quantize(model, form)
    return model


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        out: Tensor = model(**BATCHES[0]).logits
    return out


def train(tuning: Any, steps: int = 3) -> list[float]:
    optimizer, losses = tuning.optimizer(learning_rate=0.01), []
    tuning.model.train()
    for k in range(steps):
        loss = tuning.model(**BATCHES[k % len(BATCHES)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_layer_has_the_gradients_of_the_matrix_it_stands_for(form: str) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if form == "int8" else torch.float64
    layer = nn.Linear(192, 48, dtype=dtype)
    model = nn.Sequential(layer)
    assert quantize(model, form) == 1
    twin = nn.Linear(192, 48, dtype=dtype)
    twin.load_state_dict({"weight": dequantized(layer.weight), "bias": layer.bias.detach()})
    layer.weight.requires_grad_(True)
    seen = []
    layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    x = torch.randn(3, 5, 192, dtype=dtype, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    weights = torch.randn(3, 5, 48, dtype=dtype)
    y, expected = layer(x), twin(again)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    near = {"rtol": 0, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-4}
    for found, right in (
        (y, expected),
        (x.grad, again.grad),
        (seen[0], twin.weight.grad),
        (layer.bias.grad, twin.bias.grad),
    ):
        torch.testing.assert_close(found, right, **near)


@pytest.mark.parametrize(("form", "bits"), [("int8", 8), ("int4", 4), ("nf4", 4)])
def test_a_quantized_weight_is_as_small_as_its_name_says(form: str, bits: int) -> None:
    model = nn.Sequential(nn.Linear(576, 576, bias=False))
    before, expected = model[0].weight.detach().clone(), packed_bytes(model[0], form)
    quantize(model, form)
    weight = model[0].weight
    assert abs(stored_bytes(weight) - expected) <= 4
    assert bits <= 8 * stored_bytes(weight) / weight.numel() < bits + 1.2
    error = float((dequantized(weight) - before).norm() / before.norm())
    assert error < (0.01 if bits == 8 else 0.12)


def test_int4_is_within_half_a_step_of_each_number() -> None:
    layer = nn.Linear(96, 5, bias=False)
    layer.weight.data[1] = 0.25  # a constant group
    before = layer.weight.detach().clone()
    quantize(nn.Sequential(layer), "int4")
    groups = before.view(5, 3, 32)
    steps = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (dequantized(layer.weight).view(5, 3, 32) - groups).abs().amax(-1)
    assert bool((error <= 0.501 * steps + 1e-6).all())


def test_a_packed_kernel_says_itself_what_it_stands_for() -> None:
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    torch.manual_seed(0)
    weight = torch.randn(32, 1088)  # more columns than rows of the identity at a time
    packed = Int4OpaqueTensor.from_hp(weight, [1, 32])
    x = torch.randn(3, 1088)
    expected = nn.functional.linear(x, packed)
    torch.testing.assert_close(x @ dequantized(packed).t(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", METHODS)
def test_blocks_have_the_gradients_of_a_dense_model_with_originals_in_them(folder: Path, form: str, name: str) -> None:
    model = load(folder, form)
    budget = None if name == "diablo" else 0.05
    tuning = attach(model, METHODS[name], budget=budget, batches=BATCHES)
    twin = load(folder, None)
    originals = {n: p.detach().clone() for n, p in twin.named_parameters()}
    standing = {n: dequantized(m.weight) for n, m in give_gradients(model).items()}
    assert len(standing) == 14
    assert set(tuning.plan) <= set(standing)
    for n, p in twin.named_parameters():
        if n in standing:
            p.data = standing[n].clone()
        if n in tuning.plan:  # taken out: no quantization error inside the blocks
            tuning.plan[n].scatter_(p.data, tuning.plan[n].gather(originals[n]))
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-4)
    losses = [m.train()(**BATCHES[1]).loss for m in (model, twin)]
    for loss in losses:
        loss.backward()
    weights = dict(twin.named_parameters())
    for n, leaf in tuning.named_leaves().items():
        expected = tuning.plan[n].gather(weights[n].grad)
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()) + 1e-7)


@pytest.mark.parametrize("form", ["int4", "nf4"])
def test_in_float64_gradients_agree_to_rounding(folder: Path, form: str) -> None:
    model, twin = load(folder, form, torch.float64), load(folder, None, torch.float64)
    tuning = attach(model, METHODS["smt"], budget=0.05, batches=BATCHES)
    for n, p in twin.named_parameters():
        if n in tuning.plan:
            original = p.detach().clone()
            p.data = dequantized(dict(model.named_parameters())[n])
            tuning.plan[n].scatter_(p.data, tuning.plan[n].gather(original))
    for m in (model, twin):
        m(**BATCHES[1]).loss.backward()
    weights = dict(twin.named_parameters())
    assert len(tuning.plan) == 14
    for n, leaf in tuning.named_leaves().items():
        assert leaf.dtype == torch.float64
        torch.testing.assert_close(leaf.grad, tuning.plan[n].gather(weights[n].grad), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_the_probe_sees_the_quantized_model(folder: Path, form: str) -> None:
    def chosen(model: nn.Module) -> Any:
        method = parse_method({"smt": {"block_size": 16}})
        return compose(method, model, Budget.parse(0.2), batches=BATCHES, seed=0)[0]

    model = load(folder, form)
    give_gradients(model)
    same = chosen(plain(load(folder, form)))
    assert chosen(model).digest() == same.digest()


@pytest.mark.parametrize("form", FORMS)
def test_training_delta_and_plain_checkpoint_agree(folder: Path, form: str, tmp_path: Path) -> None:
    model = load(folder, form)
    standing = {n: dequantized(m.weight) for n, m in give_gradients(model).items()}
    tuning = attach(model, METHODS["smt"], budget=0.1, batches=BATCHES)
    start = logits(model)
    first = [train(tuning, 1)[0], *train(tuning, 8)]
    assert first[-1] < first[0]
    trained = logits(model)
    assert (trained - start).abs().max() > 0.01
    with tuning.base():
        torch.testing.assert_close(logits(model), start, rtol=0, atol=0)
    torch.testing.assert_close(logits(model), trained, rtol=0, atol=0)
    for n, m in give_gradients(model).items():  # the base is neither written nor replaced
        assert torch.equal(dequantized(m.weight), standing[n])
    tuning.delta().save(tmp_path / "delta")
    done = tuning.finish()
    assert done is model
    torch.testing.assert_close(logits(done), trained, rtol=0, atol=0)
    assert not any(p.requires_grad and is_quantized(p) for p in done.parameters())
    assert any(isinstance(m, PatchedLinear) for m in done.modules())

    again = apply_quantized(Delta.load(tmp_path / "delta"), load(folder, form))
    torch.testing.assert_close(logits(again), trained, rtol=0, atol=0)
    with pytest.raises(ThriftyError, match="trained before"):
        attach(again, METHODS["smt"], budget=0.1, batches=BATCHES)

    plain(again).save_pretrained(tmp_path / "plain")
    assert {type(m) for m in again.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", attn_implementation="eager")
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_lora_on_the_same_base(folder: Path, form: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    method = {"peft": {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}}
    tuning = attach(load(folder, form), method)
    losses = train(tuning, 9)
    assert losses[-3] < losses[0]
    tuning.delta().save(tmp_path / "delta")
    trained = logits(tuning.finish())
    delta = Delta.load(tmp_path / "delta")
    torch.testing.assert_close(logits(apply_quantized(delta, load(folder, form))), trained, rtol=1e-5, atol=1e-5)
    merged = apply_quantized(delta, load(folder, form), as_plain=True)
    assert {type(m) for m in merged.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    torch.testing.assert_close(logits(merged), trained, rtol=1e-3, atol=1e-3)
    with pytest.raises(ThriftyError, match="init"):
        attach(load(folder, form), {"peft": {**method["peft"], "init_lora_weights": "pissa"}})


def test_layers_that_read_one_input_keep_one_strip_of_it(folder: Path) -> None:
    method = {"random_blocks": {"block_size": 8, "scope": "per_matrix"}}
    alone = attach(load(folder, "int8"), method, budget=0.1)
    train(alone, 1)  # who shares is seen in a first step
    layers = alone.model.model.layers[0]
    strips = [getattr(layers.self_attn, n).patch.beside.member.strips for n in ("q_proj", "k_proj", "v_proj")]
    strips += [getattr(layers.mlp, n).patch.beside.member.strips for n in ("gate_proj", "up_proj")]
    assert len({id(one) for one in strips[:3]}) == len({id(one) for one in strips[3:]}) == 1
    shared = train(alone, 3)
    apart = attach(load(folder, "int8"), method, budget=0.1)
    for module in apart.model.modules():
        if isinstance(module, PatchedLinear):
            module.patch.beside.shares = False
    train(apart, 1)
    assert shared == pytest.approx(train(apart, 3), rel=1e-5)


def test_state_goes_on_where_it_stopped(folder: Path) -> None:
    whole = attach(load(folder, "int8"), METHODS["smt"], budget=0.1, batches=BATCHES)
    train(whole, 2)
    state = {n: t.clone() for n, t in whole.state().items()}
    other = attach(load(folder, "int8"), METHODS["smt"], budget=0.1, batches=BATCHES)
    other.load_state(state)
    torch.testing.assert_close(logits(other.model), logits(whole.model), rtol=0, atol=0)


def test_bfloat16_keeps_small_steps(folder: Path) -> None:
    tuning = attach(load(folder, "int8", torch.bfloat16), METHODS["smt"], budget=0.1, batches=BATCHES)
    assert {leaf.dtype for leaf in tuning.parameters()} == {torch.float32}
    train(tuning, 2)
    piece = next(iter(tuning.delta().pieces.values()))
    assert piece.dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
def test_autocast_computes_in_its_dtype(folder: Path, form: str) -> None:
    tuning = attach(load(folder, form), METHODS["smt"], budget=0.1, batches=BATCHES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tuning.model.model.layers[0].mlp.up_proj(torch.randn(2, 64)).dtype == torch.bfloat16
        tuning.model(**BATCHES[0]).loss.backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in tuning.parameters())


def test_a_base_that_torchao_quantized_itself_is_taken_as_it_is(folder: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = load(folder, None)
    quantize_(model.model.layers, Int8WeightOnlyConfig())
    tuning = attach(model, METHODS["smt"], budget=0.1, batches=BATCHES)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
    train(tuning, 2)
    tuning.check_changed()
    assert len(tuning.delta().pieces) == 14


def test_what_lies_outside_quantized_weights_trains_as_ever(folder: Path) -> None:
    model = load(folder, "int8")
    tuning = attach(model, "bitfit")
    assert all(name.endswith("bias") for name in tuning.plan)
    train(tuning, 2)
    tuning.check_changed()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("full", "reads or trains more of a weight than blocks: take smt"),
        ({"gps": {"per_row": 2}}, "reads or trains more of a weight than blocks: take smt"),
        ("gradient_axes", "reads or trains more of a weight than blocks: take smt"),
        ({"smt": {"reselect_every": 5}}, "changes its plan while it trains"),
        (
            [{"select": {"tensors": {"only": "weights"}}}],
            "only blocks of it can be trained",
        ),
    ],
)
def test_what_cannot_train_there_says_so(folder: Path, method: Any, words: str) -> None:
    model = load(folder, "int8")
    before = logits(model)
    with pytest.raises(ThriftyError, match=words):
        attach(model, method, budget=None if isinstance(method, list) or method == "full" else 0.05, batches=BATCHES)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def test_mistakes_are_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ThriftyError, match="int8"):
        quantize(load(folder, None), "int9")
    small = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50))
    with pytest.raises(ThriftyError, match="Conv1D"):
        quantize(small, "int8")
    with pytest.raises(ThriftyError, match="fits int4"):
        quantize(nn.Sequential(nn.Linear(40, 40)), "int4")
    made = LlamaForCausalLM(config())
    quantize(made, "int8")
    with pytest.raises(ThriftyError, match="from_pretrained"):
        attach(made, METHODS["smt"], budget=0.1, batches=BATCHES)
    moved = load(folder, None)
    moved.model.layers[0].mlp.up_proj.weight.data += 0.1
    quantize(moved, "int8")
    with pytest.raises(ThriftyError, match="was it replaced"):
        attach(moved, {"smt": {"target_modules": ["up_proj"]}}, budget=0.1, batches=BATCHES)
    tuning = attach(load(folder, "int8"), METHODS["smt"], budget=0.1, batches=BATCHES)
    with pytest.raises(ThriftyError, match="another base"):
        apply_quantized(tuning.delta(), moved)


@pytest.mark.parametrize("form", FORMS)
def test_peft_tuner_starts_from_originals_too(folder: Path, form: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from thrifty.integrations.peft import SmtConfig

    twin = load(folder, None)
    model = load(folder, form)
    standing = {n: dequantized(m.weight) for n, m in give_gradients(model).items()}
    wrapped = peft.get_peft_model(model, SmtConfig(budget=0.1, block_size=8, task_type="CAUSAL_LM"))
    weights = dict(twin.named_parameters())
    layers = {f"{n}.weight": m for n, m in model.named_modules() if hasattr(m, "smt_regions")}
    assert set(layers) == set(standing)
    for n, layer in layers.items():
        region, original = layer.smt_regions["default"], weights[n].detach().clone()
        weights[n].data = standing[n]
        region.scatter_(weights[n].data, region.gather(original))
    torch.testing.assert_close(logits(wrapped), logits(twin), rtol=1e-4, atol=1e-4)
    for m in (wrapped, twin):
        m.train()(**BATCHES[1]).loss.backward()
    for n, layer in layers.items():
        expected = layer.smt_regions["default"].gather(weights[n].grad)
        found = layer.smt_offsets["default"].grad
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()) + 1e-7)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folder, form), tmp_path)
    torch.testing.assert_close(logits(again), logits(wrapped), rtol=0, atol=0)


def test_the_stock_trainer_takes_peft_tuner_on_what_transformers_quantized(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig, Trainer, TrainingArguments

    from thrifty.integrations.peft import SmtConfig

    how = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how)
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], learning_rate=0.01, use_cpu=True
    )
    rows = [{key: value[k] for key, value in BATCHES[0].items()} for k in range(4)]
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments, train_dataset=rows)
    wrapped = peft.get_peft_model(model, SmtConfig(budget=0.1, block_size=8, task_type="CAUSAL_LM"))
    before = {n: p.detach().clone() for n, p in wrapped.named_parameters() if p.requires_grad}
    assert any(values.any() for values in before.values())  # originals minus quantized values
    Trainer(wrapped, arguments, train_dataset=rows).train()
    after = dict(wrapped.named_parameters())
    assert all(not torch.equal(after[n], values) for n, values in before.items())
