"""`transformers.Trainer`, as it is, trains an attached model to what a plain-autograd twin gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batches, build
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from twin import TOLERANCE, Pair, effective

CHECKPOINTING = {"gradient_checkpointing": True}


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of one batch."""

    def __init__(self, n: int, *, seed: int = 0) -> None:
        (self.batch,) = batches(1, n, 12, seed=seed)

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {key: values[i] for key, values in self.batch.items()}


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def trainer(
    model: nn.Module, folder: Path, *, callbacks: list[TrainerCallback] | None = None, **options: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**settings | options),
        train_dataset=Rows(16),
        eval_dataset=Rows(4, seed=1),
        data_collator=collate,
        callbacks=callbacks,
    )


def pair(family: str, dtype: torch.dtype, method: str) -> Pair:
    options = {"full": {}, "smt": {"budget": 0.02, "batches": batches(2, 4, 12)}, "random_blocks": {"budget": 0.02}}
    return Pair.of(build(family, dtype), method, **options[method])


def logged(run: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


F32, BF16 = torch.float32, torch.bfloat16
CASES: dict[str, tuple[str, torch.dtype, str, dict[str, Any]]] = {
    "plain": ("llama", F32, "smt", {}),
    "accumulation": ("qwen2", F32, "smt", {"gradient_accumulation_steps": 3}),
    "checkpointing": ("llama", F32, "random_blocks", CHECKPOINTING),
    "reentrant_checkpointing": (
        "llama",
        F32,
        "smt",
        {**CHECKPOINTING, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "autocast": ("granite", F32, "smt", {"bf16": True}),
    "all_three": ("gpt2", F32, "smt", {"bf16": True, **CHECKPOINTING, "gradient_accumulation_steps": 2}),
    "experts": ("mixtral", F32, "random_blocks", {**CHECKPOINTING, "gradient_accumulation_steps": 2}),
    "bfloat16_base": ("llama", BF16, "smt", {**CHECKPOINTING, "bf16": True}),
    "tied_bfloat16_base": ("gemma2", BF16, "full", {**CHECKPOINTING, "gradient_accumulation_steps": 2}),
    "adamw_foreach": ("llama", F32, "smt", {"optim": "adamw_torch"}),
    "sgd": ("llama", F32, "smt", {"optim": "sgd"}),
    "adafactor": ("llama", F32, "smt", {"optim": "adafactor"}),
    "clipped": ("llama", F32, "smt", {"max_grad_norm": 0.05}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_trainer_trains_to_the_twins_values(case: str, tmp_path: Path) -> None:
    family, dtype, method, options = CASES[case]
    both = pair(family, dtype, method)
    run, of_twin = trainer(both.tuning.model, tmp_path, **options), trainer(both.twin, tmp_path, **options)
    run.train()
    of_twin.train()
    tolerance = TOLERANCE[BF16 if options.get("bf16") else dtype]
    assert logged(run, "loss") == pytest.approx(logged(of_twin, "loss"), abs=tolerance)
    assert logged(run, "grad_norm") == pytest.approx(logged(of_twin, "grad_norm"), rel=tolerance)
    assert both.difference() < tolerance
    assert both.outside_is_untouched()
    assert {leaf.dtype for leaf in both.tuning.parameters()} == {torch.float32}
    if "max_grad_norm" in options:
        assert min(logged(run, "grad_norm")) > options["max_grad_norm"]


def test_the_default_optimizer_is_fused_and_decays_every_leaf(tmp_path: Path) -> None:
    both = pair("llama", F32, "smt")
    run = trainer(both.tuning.model, tmp_path, max_steps=1)
    run.train()
    decayed = [p for group in run.optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]]
    assert {id(p) for p in decayed} == {id(leaf) for leaf in both.tuning.parameters()}
    assert all(group["fused"] for group in run.optimizer.param_groups)


class AtStep(TrainerCallback):
    """Calls `act` after step `step`."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.act()


@pytest.mark.parametrize(("family", "dtype", "method"), [("llama", F32, "smt"), ("gpt2", BF16, "full")])
def test_what_is_saved_in_the_middle_is_a_plain_checkpoint(
    family: str, dtype: torch.dtype, method: str, tmp_path: Path
) -> None:
    both = pair(family, dtype, method)
    model, then = both.tuning.model, {}

    def save() -> None:
        then.update(effective(model, both.tuning.plan))
        run.save_model(str(tmp_path / "save_model"))
        model.save_pretrained(tmp_path / "save_pretrained")
        with torch.no_grad():
            then["logits"] = model.eval()(**Rows(4).batch).logits
        model.train()

    run = trainer(model, tmp_path / "out", callbacks=[AtStep(2, save)], save_strategy="steps", save_steps=2)
    run.train()
    both.base.save_pretrained(tmp_path / "base")
    keys = load_file(tmp_path / "base" / "model.safetensors").keys()
    for folder in (tmp_path / "save_model", tmp_path / "save_pretrained", tmp_path / "out" / "checkpoint-2"):
        assert load_file(folder / "model.safetensors").keys() == keys
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
        found = effective(plain, both.tuning.plan)
        assert all(torch.equal(found[name], then[name]) for name in found)
        with torch.no_grad():
            assert torch.equal(plain(**Rows(4).batch).logits, then["logits"])
    base, last = effective(both.base, both.tuning.plan), effective(model, both.tuning.plan)
    assert any(not torch.equal(then[name], values) for name, values in base.items())
    assert any(not torch.equal(then[name], values) for name, values in last.items())


def test_evaluation_between_steps_sees_the_trained_values(tmp_path: Path) -> None:
    both = pair("llama", F32, "smt")
    options = {"eval_strategy": "steps", "eval_steps": 2, "bf16": True}
    run, of_twin = trainer(both.tuning.model, tmp_path, **options), trainer(both.twin, tmp_path, **options)
    before = run.evaluate()["eval_loss"]
    run.train()
    of_twin.train()
    assert logged(run, "eval_loss")[-2:] == pytest.approx(logged(of_twin, "eval_loss"), abs=TOLERANCE[BF16])
    plain = trainer(both.tuning.finish(), tmp_path, bf16=True)
    assert plain.evaluate()["eval_loss"] == logged(run, "eval_loss")[-1] != before


def test_the_trainers_own_checkpoint_resumes(tmp_path: Path) -> None:
    both, again = pair("llama", F32, "smt"), pair("llama", F32, "smt")
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer(both.tuning.model, tmp_path, **options).train()
    set_seed(1)
    trainer(again.tuning.model, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    # not bit for bit: the checkpoint of a stock Trainer holds W, not the offset
    again.twin, again.offsets = both.tuning.model, both.tuning.named_leaves()
    assert again.difference() < TOLERANCE[F32]


def test_the_best_model_comes_back_at_the_end(tmp_path: Path) -> None:
    both = pair("llama", F32, "smt")
    at_two: dict[str, Tensor] = {}
    keep = AtStep(2, lambda: at_two.update(effective(both.tuning.model, both.tuning.plan)))
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = trainer(both.tuning.model, tmp_path, callbacks=[keep], learning_rate=1.0, **options, **best)
    run.train()
    assert run.state.best_global_step == 2  # the highest loss: the last one is lower
    found = effective(both.tuning.model, both.tuning.plan)
    assert all(torch.equal(found[name], values) for name, values in at_two.items())
    both.tuning.sync()  # the leaf came back with the weights: writing it again gives the same up to rounding
    again = effective(both.tuning.model, both.tuning.plan)
    for name, values in at_two.items():
        torch.testing.assert_close(again[name], values, rtol=0, atol=1e-6)
