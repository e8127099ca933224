"""TRL's trainers, as they are, train an attached model to what a plain-autograd twin gives."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import batches, build
from tiny_tokenizer import character_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from twin import TOLERANCE, Pair

F32, BF16 = torch.float32, torch.bfloat16
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "max_length": 48,
}


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def rows(n: int = 8) -> Dataset:
    """Sums with a right and a wrong answer, for either trainer."""
    draw, made = random.Random(0), []
    for _ in range(n):
        a, b = draw.randrange(100), draw.randrange(10)
        right, wrong = turn("assistant", str(a + b)), turn("assistant", str(a * b))
        made.append({"prompt": turn("user", f"{a}+{b}"), "completion": right, "chosen": right, "rejected": wrong})
    return Dataset.from_list(made)


def sft(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    data = rows().select_columns(["prompt", "completion"])
    args = SFTConfig(output_dir=str(folder), **SETTINGS | options)
    run = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=character_tokenizer())
    run.train()
    return run


def dpo(model: nn.Module, folder: Path, *, reference: nn.Module | None = None, **options: Any) -> Trainer:
    data = rows().select_columns(["prompt", "chosen", "rejected"])
    args = DPOConfig(output_dir=str(folder), **SETTINGS | options)
    tokenizer = character_tokenizer()
    run = DPOTrainer(model=model, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer)
    run.train()
    return run


def pair(model: nn.Module, method: str = "smt") -> Pair:
    options = {"full": {}, "smt": {"budget": 0.02, "batches": batches(2, 4, 12)}, "random_blocks": {"budget": 0.02}}
    return Pair.of(model, method, **options[method])


def logged(run: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


def check(both: Pair, run: Trainer, of_twin: Trainer, *, tolerance: float) -> None:
    assert logged(run, "loss") == pytest.approx(logged(of_twin, "loss"), abs=tolerance)
    assert logged(run, "grad_norm") == pytest.approx(logged(of_twin, "grad_norm"), rel=tolerance)
    assert both.difference() < tolerance
    assert both.outside_is_untouched()
    assert {leaf.dtype for leaf in both.tuning.parameters()} == {torch.float32}


# TRL's own defaults are bfloat16 autocast and gradient checkpointing
SFT_CASES: dict[str, tuple[str, torch.dtype, str, dict[str, Any]]] = {
    "defaults": ("llama", F32, "smt", {}),
    "float32_accumulation": ("granite", F32, "smt", {"bf16": False, "gradient_accumulation_steps": 2}),
    "experts": ("mixtral", F32, "random_blocks", {"bf16": False}),
    "tied_head_read_directly": ("gemma2", BF16, "full", {}),
}


@pytest.mark.parametrize("case", SFT_CASES)
def test_sft_trains_to_the_twins_values(case: str, tmp_path: Path) -> None:
    family, dtype, method, options = SFT_CASES[case]
    both = pair(build(family, dtype), method)
    run, of_twin = sft(both.tuning.model, tmp_path, **options), sft(both.twin, tmp_path, **options)
    assert run.args.gradient_checkpointing
    check(both, run, of_twin, tolerance=TOLERANCE[F32 if options.get("bf16") is False else BF16])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_of_a_head_that_trl_reads_directly_train(family: str, tmp_path: Path) -> None:
    method = {"random_blocks": {"target_modules": ["lm_head"], "block_size": 16}}
    both = Pair.of(build(family), method, budget=0.02)  # of gpt2 it is the embedding too
    run, of_twin = sft(both.tuning.model, tmp_path, bf16=False), sft(both.twin, tmp_path, bf16=False)
    check(both, run, of_twin, tolerance=TOLERANCE[F32])


def moves_off_log_2(run: Trainer, *, tolerance: float) -> None:
    first, *others = logged(run, "loss")
    assert first == pytest.approx(math.log(2), abs=tolerance)
    assert max(abs(loss - math.log(2)) for loss in others) > 1e-2
    assert any(logged(run, "rewards/margins")[1:])


DPO_CASES: dict[str, tuple[str, torch.dtype, str, dict[str, Any]]] = {
    "defaults": ("llama", F32, "smt", {}),
    "float32_accumulation": ("llama", F32, "smt", {"bf16": False, "gradient_accumulation_steps": 2}),
    "tied_head_read_directly": ("gpt2", BF16, "full", {}),
}


@pytest.mark.parametrize("case", DPO_CASES)
def test_dpo_with_a_reference_of_its_own_trains_to_the_twins_values(case: str, tmp_path: Path) -> None:
    family, dtype, method, options = DPO_CASES[case]
    both = pair(build(family, dtype), method)
    reference = copy.deepcopy(both.base)
    run = dpo(both.tuning.model, tmp_path, reference=reference, **options)
    of_twin = dpo(both.twin, tmp_path, reference=copy.deepcopy(both.base), **options)
    tolerance = TOLERANCE[F32 if options.get("bf16") is False else BF16]
    check(both, run, of_twin, tolerance=tolerance)
    moves_off_log_2(run, tolerance=1e-5)
    assert all(torch.equal(p, reference.get_parameter(name)) for name, p in both.base.named_parameters())


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}], ids=["loaded", "precomputed"])
def test_dpo_without_a_reference_takes_the_base(options: dict[str, Any], tmp_path: Path) -> None:
    # TRL loads the reference from where the policy came from, or scores the data once, before the first step
    build("llama").save_pretrained(tmp_path / "base")

    def fresh() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager").train()

    both = pair(fresh())
    run = dpo(both.tuning.model, tmp_path / "run", bf16=False, **options)
    of_twin = dpo(both.twin, tmp_path / "twin", bf16=False, reference=fresh())
    check(both, run, of_twin, tolerance=TOLERANCE[F32])
    moves_off_log_2(run, tolerance=1e-5)
    if not options:
        assert all(torch.equal(p, run.ref_model.get_parameter(name)) for name, p in both.base.named_parameters())


def test_dpo_without_a_reference_and_without_a_folder_is_refused_by_trl(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Repo id"):
        dpo(pair(build("llama")).tuning.model, tmp_path)


def test_dpo_with_a_deep_copy_of_the_attached_model_as_reference(tmp_path: Path) -> None:
    both = pair(build("llama"))
    reference = copy.deepcopy(both.tuning.model)
    run = dpo(both.tuning.model, tmp_path, reference=reference, bf16=False)
    of_twin = dpo(both.twin, tmp_path, reference=copy.deepcopy(both.base), bf16=False)
    check(both, run, of_twin, tolerance=TOLERANCE[F32])
    moves_off_log_2(run, tolerance=1e-5)
    assert all(torch.equal(p, reference.get_parameter(name)) for name, p in both.base.named_parameters())


def test_a_reference_that_follows_must_be_a_deep_copy_of_the_attached_model(tmp_path: Path) -> None:
    options = {"bf16": False, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    both = pair(build("llama"))
    reference = copy.deepcopy(both.tuning.model)
    run = dpo(both.tuning.model, tmp_path, reference=reference, **options)
    of_twin = dpo(both.twin, tmp_path, reference=copy.deepcopy(both.twin), **options)
    check(both, run, of_twin, tolerance=TOLERANCE[F32])
    # TRL pairs the parameters of the two models in order, and a plain model has no leaves
    other = pair(build("llama"))
    with pytest.raises(RuntimeError, match="must match the size"):
        dpo(other.tuning.model, tmp_path, reference=copy.deepcopy(other.base), **options)
