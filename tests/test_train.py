"""Whole runs on tiny checkpoints: what they leave, what they equal, and what they refuse."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_run import configuration, prepare
from transformers import AutoModelForCausalLM

import thrifty.run.eval_loss as eval_loss_module
from thrifty.core.errors import ThriftyError
from thrifty.core.registry import get
from thrifty.delta import Delta
from thrifty.run.checkpoint import checkpoints
from thrifty.run.config import load_config
from thrifty.run.metrics import read_metrics
from thrifty.run.train import run_training, train
from thrifty.run.trainer import ThriftyTrainer

LORA = {"peft": {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path)


def test_what_a_run_leaves(folder: Path) -> None:
    measured = {"loss": True, "exact_match": 2, "before": True}
    run = train(configuration(folder, eval=measured, eval_steps=5))
    out = folder / "out"
    assert run.output_dir == out
    summary = json.loads((out / "summary.json").read_text())
    assert summary == run.summary
    assert {
        "method", "trainable_parameters", "trainable_share", "plan_sha256", "train_seconds", "probe_seconds",
        "tokens_per_second", "peak_memory_bytes", "evaluation", "versions", "seed",
    } <= summary.keys()  # fmt: skip
    assert summary["method"] == "smt"
    assert summary["seed"] == 7
    assert 0.045 < summary["trainable_share"] <= 0.05
    assert 0 < summary["probe_seconds"] < summary["train_seconds"]
    assert 0 < summary["peak_memory_bytes"] < 500e6
    before, after = summary["evaluation"]["before"], summary["evaluation"]["after"]
    assert before.keys() == after.keys() == {"loss", "exact_match"}
    assert after["loss"] < before["loss"]

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 3, 6, 9]
    assert [line["step"] for line in lines if "eval_loss" in line] == [5, 10]
    assert lines[-1]["eval_loss"] == pytest.approx(after["loss"], rel=1e-5)
    assert load_config(out / "run.yaml").training["learning_rate"] == 0.01

    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    original = {name: p.detach().clone() for name, p in base.named_parameters()}
    delta = Delta.load(out / "delta")
    delta.apply(base)
    trained = dict(run.model.named_parameters())
    for name, p in base.named_parameters():
        assert torch.equal(p, trained[name]), name
        assert torch.equal(p, original[name]) == (name not in delta.plan)
    assert type(run.model) is type(base)
    assert not run.model.training
    assert run.model.config.use_cache
    assert "forward" not in vars(run.model)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(run.model(input_ids=ids).logits, base.eval()(input_ids=ids).logits)


def test_the_run_file_it_leaves_repeats_it(folder: Path) -> None:
    first = train(configuration(folder))
    again = train(folder / "out" / "run.yaml", output_dir=str(folder / "again"))
    assert again.summary["evaluation"] == first.summary["evaluation"]
    name = "delta/delta.safetensors"
    assert (folder / "again" / name).read_bytes() == (folder / "out" / name).read_bytes()


@pytest.mark.parametrize("method", ["full", "random_blocks", LORA])
def test_every_method_trains(method: Any, folder: Path) -> None:
    budget = 0.05 if method == "random_blocks" else None
    run = train(configuration(folder, method=method, budget=budget, eval={"before": True}, bf16=True))
    assert run.summary["evaluation"]["after"]["loss"] < run.summary["evaluation"]["before"]["loss"]
    assert not any("lora" in name for name, _ in run.model.named_parameters())
    assert not vars(run.model).keys() & {"forward", "_original_forward"}
    assert Delta.load(folder / "out" / "delta").total == 34_840


def test_the_learning_rate_is_the_methods_own(folder: Path) -> None:
    config = configuration(folder, max_steps=1)
    del config["learning_rate"]
    assert train(config).summary["learning_rate"] == get("smt").learning_rate


@pytest.mark.parametrize("changes", [{}, {"train_sampling_strategy": "group_by_length"}, {"packing": True}], ids=str)
def test_micro_batches_equal_the_big_batch(folder: Path, changes: dict[str, Any]) -> None:
    """Rows of uneven length and uneven numbers of labels: only a loss per token makes these equal."""
    values, losses = [], []
    for rows, accumulation in ((4, 1), (2, 2), (1, 4)):
        train(
            configuration(
                folder,
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=accumulation,
                optim="sgd",
                learning_rate=0.1,
                output_dir=str(folder / f"out{rows}"),
                logging_steps=1,
                **changes,
            )
        )
        losses.append(
            [line["loss"] for line in read_metrics(folder / f"out{rows}" / "metrics.jsonl") if "loss" in line]
        )
        values.append(checkpoints(folder / f"out{rows}")[-1].values())
    assert len(losses[0]) == 10
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)
    for other in values[1:]:
        assert other.keys() == values[0].keys()
        for name, value in values[0].items():
            assert value.abs().max() > 1e-4
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-6)


def test_checkpointing_differentiates_nothing_below(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock trainer makes the embeddings' output require a gradient when it switches checkpointing on."""
    real: Callable[..., Any] = ThriftyTrainer.training_step
    needed: list[bool] = []

    def training_step(self: ThriftyTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        hooks = [
            layer.register_forward_pre_hook(
                lambda module, a, k: needed.append((a[0] if a else k["hidden_states"]).requires_grad), with_kwargs=True
            )
            for layer in model.model.layers
        ]
        loss = real(self, model, *args, **kwargs)
        for hook in hooks:
            hook.remove()
        return loss

    monkeypatch.setattr(ThriftyTrainer, "training_step", training_step)
    method = {"smt": {"block_size": 8, "target_modules": r".*layers\.1\..*"}}
    run = train(configuration(folder, method=method, max_steps=1, gradient_checkpointing=True))
    assert all(".layers.1." in name for name in run.delta.plan)
    assert needed
    assert not any(needed)
    assert not run.model.is_gradient_checkpointing
    with pytest.raises(ThriftyError, match="use_reentrant must be false"):
        train(configuration(folder, gradient_checkpointing_kwargs={"use_reentrant": True}))


def test_the_best_and_the_last_are_kept(folder: Path) -> None:
    """At this learning rate the evaluation loss rises again after a few steps."""
    changes = {"max_steps": 60, "eval_steps": 1, "learning_rate": 0.3, "early_stopping_patience": 3}
    run = train(configuration(folder, **changes))
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert run.summary["steps"] == best + 3 < 60
    assert run.summary["best_step"] == run.summary["result_step"] == best
    assert [c.step for c in checkpoints(folder / "out")] == [best, best + 3]
    assert run.summary["evaluation"]["after"]["loss"] == pytest.approx(losses[best], rel=1e-5)
    last = train(configuration(folder, **changes, load_best_model_at_end=False, output_dir=str(folder / "last")))
    assert last.summary["result_step"] == best + 3
    assert last.summary["evaluation"]["after"]["loss"] == pytest.approx(losses[best + 3], rel=1e-5)


def test_an_evaluation_batch_runs_before_the_first_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: Any, batch: dict[str, torch.Tensor]) -> None:
        assert batch["input_ids"].shape == (8, 14)  # the longest row is in it
        raise torch.OutOfMemoryError

    steps = []
    monkeypatch.setattr(eval_loss_module, "sum_loss", full)
    monkeypatch.setattr(ThriftyTrainer, "training_step", lambda *args, **kwargs: steps.append(1))
    with pytest.raises(ThriftyError, match=r"evaluation batch of 8 rows .* lower per_device_eval_batch_size \(now 8\)"):
        train(configuration(folder, eval_steps=5))
    assert not steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "moved no trained value"),
        ({"learning_rate": 1e38, "max_grad_norm": 0, "optim": "sgd"}, "training loss is nan"),
        ({"report_to": "wandbb"}, "report_to: unknown tracker 'wandbb'"),
        ({"early_stopping_patience": 2}, "give eval_steps"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs evaluations"),
        ({"eval_on_start": True}, "eval.before"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "requires an eval strategy"),
        ({"max_length": 4}, "cuts every answer off"),
        ({"eval": {"forgetting": "nowhere.txt"}}, "there is no file 'nowhere.txt'"),
        ({"eval": {"choice": 2, "choices": ["a", "b"]}}, "is none of its options"),
        ({"budget": 0.00001}, "budget"),
    ],
)
def test_what_cannot_work_is_one_line(changes: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ThriftyError, match=message) as caught:
        train(configuration(folder, **changes))
    assert "\n" not in str(caught.value)
    assert not (folder / "out" / "summary.json").exists()


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    config = json.loads((folder / "model" / "tokenizer.json").read_text())
    config["model"]["vocab"]["1"] = 500
    (folder / "model" / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(ThriftyError, match="token id 500 is outside the vocabulary of 97"):
        train(configuration(folder))
    assert not (folder / "out").exists()


def test_a_finished_run_is_not_overwritten(folder: Path) -> None:
    train(configuration(folder, max_steps=2))
    before = (folder / "out" / "summary.json").read_text()
    with pytest.raises(ThriftyError, match="holds a finished run; give another one"):
        train(configuration(folder, max_steps=2))
    assert (folder / "out" / "summary.json").read_text() == before


def test_ctrl_c_says_what_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real: Callable[..., Any] = ThriftyTrainer.training_step

    def training_step(self: ThriftyTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ThriftyTrainer, "training_step", training_step)
    with pytest.raises(KeyboardInterrupt):
        train(configuration(folder, save_steps=2))
    assert (
        f"stopped: {folder / 'out' / 'checkpoint-2'} is whole; resume_from_checkpoint=auto" in capsys.readouterr().out
    )


def test_the_live_line_on_a_terminal(folder: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    run_training(load_config(configuration(folder, eval_steps=5)), console=console)
    shown = screen.getvalue()
    for part in ("10/10", "loss ", "eval loss ", "tokens/s", "MiB", "left", "1,728 of 34,840 numbers trained"):
        assert part in shown, part
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0  # the cursor is back


def test_tensorboard_gets_the_metrics(folder: Path) -> None:
    train(configuration(folder, max_steps=2, report_to="tensorboard", logging_steps=1))
    (events,) = (folder / "out" / "runs").rglob("events.out.tfevents.*")
    assert b"train/tokens_per_second" in events.read_bytes()
