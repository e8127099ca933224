"""A run stopped at any moment and resumed ends as if it had never stopped: bit for bit, metrics too."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import configuration, prepare

from thrifty.core.errors import ThriftyError
from thrifty.run.checkpoint import checkpoints
from thrifty.run.train import train
from thrifty.run.trainer import ThriftyTrainer

_TIMES = {"seconds", "train_seconds", "tokens_per_second", "memory_bytes"}


def result(output: Path) -> dict[str, Any]:
    """All that must not depend on interruptions: values, optimizer, random states, delta, metrics, evaluation."""
    last = checkpoints(output)[-1].folder
    names = ["values.safetensors", "optimizer.safetensors", "random.json", "random.safetensors", "scheduler.json"]
    found: dict[str, Any] = {name: (last / name).read_bytes() for name in names}
    found |= {file.name: file.read_bytes() for file in (output / "delta").rglob("*.safetensors")}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in line.items() if k not in _TIMES} for line in lines]
    summary = json.loads((output / "summary.json").read_text())
    kept = ("evaluation", "steps", "tokens", "padding", "packed_rows", "best_step", "result_step", "best_eval_loss")
    found["summary"] = [summary[key] for key in kept]
    return found


def stop_in(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C in the step after `step`, in the last of its micro-batches."""
    real: Callable[..., Any] = ThriftyTrainer.training_step

    def training_step(self: ThriftyTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = real(self, *args, **kwargs)
        if self.state.global_step == step and self.accelerator.sync_gradients:
            raise KeyboardInterrupt
        return loss

    monkeypatch.setattr(ThriftyTrainer, "training_step", training_step)


LORA = {"peft": {"peft_type": "LORA", "r": 2, "lora_dropout": 0.1, "target_modules": "all-linear"}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("llama", {"eval_steps": 2, "save_steps": 2}),
    "bfloat16": ("llama", {"dtype": "bfloat16", "save_steps": 3, "weight_decay": 0.1}),
    "autocast": ("llama", {"bf16": True, "save_steps": 3, "eval_strategy": "epoch"}),
    "accumulation": ("gpt2", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "save_steps": 4}),
    "checkpointing": ("gpt2", {"gradient_checkpointing": True, "save_steps": 3, "lr_scheduler_type": "cosine"}),
    "epochs": ("llama", {"save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch"}),
    "end_of_epoch": ("llama", {"save_steps": 6, "eval_strategy": "epoch", "logging_strategy": "epoch"}),
    "full": ("llama", {"method": "full", "budget": None, "save_steps": 3, "learning_rate": 1e-3}),
    "sparsegrad": ("llama", {"method": "sparsegrad", "dtype": "bfloat16", "save_steps": 3}),
    "gradient_axes": ("llama", {"method": "gradient_axes", "dtype": "bfloat16", "save_steps": 3, "weight_decay": 0.1}),
    "grouped": ("llama", {"train_sampling_strategy": "group_by_length", "save_steps": 2}),
    "packed": ("gpt2", {"packing": True, "per_device_train_batch_size": 2, "save_steps": 2, "eval_steps": 4}),
    "columns by muon": ("llama", {"method": {"smt": {"block_size": "column"}}, "optim": "muon", "save_steps": 3}),
    "lora by muon": ("llama", {"method": LORA, "budget": None, "optim": "muon", "save_steps": 3}),
    "lora": ("llama", {"method": LORA, "budget": None, "save_steps": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_uninterrupted(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, changes = CASES[case]
    prepare(tmp_path, family=family, dropout=0.1)
    train(configuration(tmp_path, **changes, output_dir=str(tmp_path / "whole")))
    config = configuration(tmp_path, **changes, resume_from_checkpoint="auto")
    for step in (5, 8):
        with monkeypatch.context() as patch:
            stop_in(patch, step)
            with pytest.raises(KeyboardInterrupt):
                train(config)
    train(config)
    expected, found = result(tmp_path / "whole"), result(tmp_path / "out")
    for key in expected:
        assert found[key] == expected[key], key


def test_stopped_while_evaluating_at_the_end_of_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of an epoch's last step waits for what the end of the epoch logs and measures."""
    prepare(tmp_path)
    changes = {"save_steps": 6, "eval_strategy": "epoch", "logging_strategy": "epoch"}
    train(configuration(tmp_path, **changes, output_dir=str(tmp_path / "whole")))

    def evaluate(self: ThriftyTrainer, *args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    config = configuration(tmp_path, **changes, resume_from_checkpoint="auto")
    with monkeypatch.context() as patch:
        patch.setattr(ThriftyTrainer, "evaluate", evaluate)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(config)
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_a_run_killed_after_its_last_step_makes_no_other(tmp_path: Path) -> None:
    prepare(tmp_path)
    changes = {"max_steps": 40, "eval_steps": 1, "early_stopping_patience": 2, "learning_rate": 0.3}
    config = configuration(tmp_path, **changes, resume_from_checkpoint="auto")
    first = train(config)
    expected = result(tmp_path / "out")
    assert first.summary["steps"] < 40
    (tmp_path / "out" / "summary.json").unlink()  # as if killed in the last evaluation
    train(config)
    assert result(tmp_path / "out") == expected


def test_training_goes_on_with_more_steps(tmp_path: Path) -> None:
    prepare(tmp_path)
    train(configuration(tmp_path, lr_scheduler_type="constant", max_steps=5))
    train(configuration(tmp_path, lr_scheduler_type="constant", resume_from_checkpoint="auto"))
    train(configuration(tmp_path, lr_scheduler_type="constant", output_dir=str(tmp_path / "whole")))
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_more_steps_have_the_new_schedules_rate(tmp_path: Path) -> None:
    prepare(tmp_path)
    train(configuration(tmp_path, max_steps=5))
    train(configuration(tmp_path, resume_from_checkpoint="auto", logging_steps=1))
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    rates = {line["step"]: line["learning_rate"] for line in map(json.loads, lines)}
    assert rates[6] == pytest.approx(0.01 * (10 - 5) / 10)


def test_an_earlier_checkpoint_drops_what_came_after_it(tmp_path: Path) -> None:
    prepare(tmp_path)
    train(configuration(tmp_path, save_steps=3, save_total_limit=9))
    expected = result(tmp_path / "out")
    train(configuration(tmp_path, save_steps=3, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3")))
    assert result(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"budget": 0.02}, "budget was 0.05"),
        ({"method": "random_blocks"}, "method"),
        ({"seed": 8}, "seed was 7"),
        ({"weight_decay": 0.5}, "weight_decay was 0.0"),
        ({"per_device_train_batch_size": 2}, "gradient_accumulation_steps * processes was 4 * 1 * 1"),
        ({"max_length": 40}, "max_length"),
        ({"data": {"train": "other.jsonl"}}, "data.train"),
    ],
)
def test_a_changed_configuration_is_refused(
    changes: dict[str, Any], named: str, tmp_path: Path, stopped_run: Path
) -> None:
    config = configuration(stopped_run, **{"resume_from_checkpoint": "auto", **changes})
    with pytest.raises(ThriftyError, match=re.escape(named)) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert checkpoints(stopped_run / "out")[-1].step == 4


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose run was stopped after step 5, with a checkpoint of step 4."""
    folder = prepare(tmp_path_factory.mktemp("stopped"))
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(configuration(folder, save_steps=4))
    return folder


def last_checkpoint(folder: Path) -> Path:
    return checkpoints(folder / "out")[-1].folder


def test_changed_content_is_refused(stopped_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = stopped_run / "train.jsonl"
    text = file.read_text()
    file.write_text(text.replace("+", "-", 1))
    with pytest.raises(ThriftyError, match=r"data\.train: .*train\.jsonl has changed: .*allow_changed_data=true"):
        train(configuration(stopped_run, resume_from_checkpoint="auto"))
    with caplog.at_level(logging.WARNING, logger="thrifty"):
        changed = {"allow_changed_data": True, "output_dir": str(tmp_path), "max_steps": 5, "save_strategy": "no"}
        train(configuration(stopped_run, resume_from_checkpoint=str(last_checkpoint(stopped_run)), **changed))
    assert [line for line in caplog.messages if "train.jsonl has other rows than" in line]
    file.write_text(text)


def test_micro_batches_may_change_if_the_step_keeps_its_rows(tmp_path: Path) -> None:
    prepare(tmp_path)
    train(configuration(tmp_path, max_steps=5))
    smaller = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    run = train(configuration(tmp_path, **smaller, resume_from_checkpoint="auto"))
    assert run.summary["steps"] == 10


def test_an_unfinished_run_is_not_overwritten(stopped_run: Path) -> None:
    with pytest.raises(ThriftyError, match=r"stopped after step 4; .*resume_from_checkpoint=auto"):
        train(configuration(stopped_run))
    with pytest.raises(ThriftyError, match="no complete checkpoint"):
        train(configuration(stopped_run, resume_from_checkpoint=str(stopped_run / "out")))
