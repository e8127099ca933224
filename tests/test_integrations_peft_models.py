"""PEFT's SMT tuner on transformers' models: their adapter calls, Trainer, TRL, and deltas made of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import batches, build
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.utils.quantization_utils import QuantizationBackend
from smt_small import layers
from test_loops_trl import SETTINGS, logged, rows
from tiny_tokenizer import character_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from thrifty import Delta, attach
from thrifty.core.errors import ThriftyError
from thrifty.integrations import smt_layer
from thrifty.integrations.peft import SmtConfig, to_delta

(BATCH,) = batches(1, 3, 10)
F32, BF16 = torch.float32, torch.bfloat16


def smt(**options: Any) -> SmtConfig:
    return SmtConfig(**{"block_size": 8, "budget": 0.05, "init_weights": False, "task_type": "CAUSAL_LM"} | options)


def scaled(model: Any) -> Any:
    """Offsets as small as trained ones."""
    for layer in layers(model):
        for leaf in layer.smt_offsets.values():
            leaf.data.mul_(0.05)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits


def offsets(model: nn.Module) -> dict[str, Tensor]:
    return {layer.target.name: layer.smt_offsets["default"].detach().clone() for layer in layers(model)}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_transformers_own_adapter_calls(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(family, dtype)
    model.add_adapter(smt(), adapter_name="one")
    with_one = logits(scaled(model))
    model.save_pretrained(tmp_path / "injected")
    wrapped = scaled(get_peft_model(build(family, dtype), smt()))
    with_two = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "wrapped")

    model = build(family, dtype)
    plain = logits(model)
    model.load_adapter(str(tmp_path / "injected"), adapter_name="one")
    model.load_adapter(str(tmp_path / "wrapped"), adapter_name="two", is_trainable=True)
    assert {leaf.dtype for layer in layers(model) for leaf in layer.smt_offsets.values()} == {F32}
    for name, expected in (("one", with_one), ("two", with_two)):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    assert not torch.allclose(with_one, with_two)
    model.disable_adapters()
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=0)
    model.enable_adapters()
    model.delete_adapter("two")
    assert model.active_adapters() == ["one"]
    torch.testing.assert_close(logits(model), with_one, rtol=0, atol=0)
    loaded = PeftModel.from_pretrained(build(family, dtype), tmp_path / "injected")
    torch.testing.assert_close(logits(loaded), with_one, rtol=0, atol=0)


def test_an_adapter_folder_alone_opens_with_its_base(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), smt())
    expected = logits(scaled(model))
    model.save_pretrained(tmp_path / "adapter")
    for loader in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        torch.testing.assert_close(logits(loader.from_pretrained(tmp_path / "adapter")), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trains_as_the_blocks_in_place_do(family: str) -> None:
    tuning = attach(build(family), "smt", budget=0.03, batches=batches(2, 4, 12))
    added = get_peft_model(build(family), SmtConfig(selection=tuning.plan))
    leaves = offsets(added)
    ours = {name.removesuffix(".weight"): leaf for name, leaf in tuning.named_leaves().items()}
    assert {name: t.shape for name, t in leaves.items()} == {name: t.shape for name, t in ours.items()}
    for model in (tuning.model, added):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(**BATCH).loss.backward()
            optimizer.step()
    for name, leaf in offsets(added).items():
        assert float(leaf.abs().max()) > 0
        torch.testing.assert_close(leaf, ours[name].detach(), rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_and_generation() -> None:
    model = scaled(get_peft_model(build("llama"), smt()))
    model.train()(**BATCH).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**BATCH).loss.backward()
    assert len(plain) == len(layers(model))
    for name, p in model.named_parameters():
        if name in plain:
            torch.testing.assert_close(p.grad, plain[name])
    out = model.eval().generate(input_ids=BATCH["input_ids"][:1, :4], max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= 7


def trainer(folder: Path, steps: int, **options: Any) -> Trainer:
    data = Dataset.from_list([{k: t[0].tolist() for k, t in batch.items()} for batch in batches(8, 1, 12)])
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=2, learning_rate=1e-2, use_cpu=True, report_to="none",
        per_device_train_batch_size=2, disable_tqdm=True, lr_scheduler_type="constant", seed=3, **options,
    )  # fmt: skip
    return Trainer(get_peft_model(build("llama"), smt(init_weights=True)), args, train_dataset=data)


def test_trainer_saves_adapters_and_resumes(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", 4)
    whole.train()
    trainer(tmp_path / "parts", 2).train()
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    resumed = trainer(tmp_path / "parts", 4)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, leaf in offsets(resumed.model).items():
        torch.testing.assert_close(leaf, offsets(whole.model)[name], rtol=0, atol=0)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "whole" / "checkpoint-4")
    torch.testing.assert_close(logits(loaded), logits(whole.model), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_sft_trainer_takes_the_config(dtype: torch.dtype, tmp_path: Path) -> None:
    """TRL's own defaults: bfloat16 autocast and gradient checkpointing."""
    model = build("llama", dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = rows().select_columns(["prompt", "completion"])
    args = SFTConfig(output_dir=str(tmp_path), **SETTINGS)
    tokenizer = character_tokenizer()
    config = smt(init_weights=True)
    run = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=config)
    run.train()
    assert logged(run, "loss")[-1] < logged(run, "loss")[0]
    assert {t.dtype for t in offsets(run.model).values()} == {F32}
    assert all(bool(t.any()) for t in offsets(run.model).values())
    for name, p in run.model.unload().named_parameters():
        assert torch.equal(p, before[name])
    run.save_model(str(tmp_path / "adapter"))


def test_dpo_trainer_takes_the_base_as_reference(tmp_path: Path) -> None:
    data = rows().select_columns(["prompt", "chosen", "rejected"])
    args = DPOConfig(output_dir=str(tmp_path), **SETTINGS)
    tokenizer = character_tokenizer()
    config = smt(init_weights=True)
    run = DPOTrainer(
        model=build("llama"), args=args, train_dataset=data, processing_class=tokenizer, peft_config=config
    )
    run.train()
    first, *others = logged(run, "loss")
    assert first == pytest.approx(0.6931, abs=1e-3)
    assert min(others) < first - 1e-3


def test_trained_tokens_and_whole_modules_beside_the_blocks(tmp_path: Path) -> None:
    config = smt(init_weights=True, trainable_token_indices=[5, 7], modules_to_save=["lm_head"])
    model = get_peft_model(build("llama"), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**BATCH).loss.backward()
    optimizer.step()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(build("llama"), tmp_path)), expected, rtol=0, atol=0)
    with pytest.raises(ThriftyError, match="is trained beside the blocks"):
        to_delta(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_delta_of_it_is_what_merging_gives(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = scaled(get_peft_model(build(family, dtype), smt()))
    to_delta(model).save(tmp_path / "delta")
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    base = build(family, dtype)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    delta = Delta.load(tmp_path / "delta")
    assert delta.plan.trainable_parameters == model.get_nb_trainable_parameters()[0]
    delta.apply(base)
    assert all(torch.equal(p, merged[name]) for name, p in base.named_parameters())
    delta.remove(base)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    with pytest.raises(ThriftyError, match="unknown SMT adapter 'defualt'; did you mean 'default'"):
        to_delta(model, adapter="defualt")
    model.merge_adapter()
    with pytest.raises(ThriftyError, match="is merged: call unmerge_adapter"):
        to_delta(model)


class Int8Linear(nn.Linear):
    """A quantized layer as PEFT sees one: an integer weight, and a backend that reads and writes it."""

    def quantize(self) -> Int8Linear:
        values = self.weight.data
        self.scale = values.abs().max() / 127
        self.weight = nn.Parameter((values / self.scale).round().to(torch.int8), requires_grad=False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Int8Backend(QuantizationBackend):
    backend_name, layer_type, supports_merge = "int8", "linear", True

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        return base_layer.weight.data.float() * base_layer.scale

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        layer = peft_layer.get_base_layer()
        layer.weight.data = (weight_data / layer.scale).round().clamp(-127, 127).to(torch.int8)


def test_a_quantized_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smt_layer, "resolve_quantization_backend", lambda layer, **_: Int8Backend())
    model = nn.Sequential(Int8Linear(12, 9).quantize(), nn.Tanh(), Int8Linear(9, 4).quantize())
    x = torch.randn(5, 12)
    plain, before = model(x), [p.detach().clone() for p in model.parameters()]
    tuned = get_peft_model(model, SmtConfig(budget="50%", block_size=3))
    torch.testing.assert_close(tuned(x), plain, rtol=0, atol=0)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        tuned(x).square().sum().backward()
        optimizer.step()
    y = tuned(x)
    assert bool(y.square().sum() < plain.square().sum())
    tuned.merge_adapter()
    torch.testing.assert_close(tuned(x), y, rtol=0.05, atol=0.05)
    tuned.unmerge_adapter()
    now = [p for name, p in tuned.named_parameters() if "smt_" not in name]
    assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
    with pytest.raises(ThriftyError, match="is quantized: a delta is of plain weights"):
        to_delta(tuned)
