"""What goes wrong while a run works: losses that are not finite, memory, folders, the hub; and runs made again."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_resume import result
from tiny_run import configuration, prepare
from torch import Tensor

from thrifty.cli.main import main
from thrifty.core.errors import ThriftyError
from thrifty.run.checkpoint import checkpoints
from thrifty.run.config import load_config
from thrifty.run.nonfinite import FiniteSteps
from thrifty.run.train import train
from thrifty.run.trainer import ThriftyTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("faults"))


Batches = list[tuple[ThriftyTrainer, dict[str, Any]]]


def spoiled(patch: pytest.MonkeyPatch, *, step: int, part: int = 0, value: float = float("nan")) -> Batches:
    """The loss of micro-batch `part` of each step from `step` (counted from 1) on, up to `step` itself, is `value`;
    returns what was spoiled."""
    real: Callable[..., Any] = ThriftyTrainer.compute_loss
    seen: Batches = []
    parts: dict[int, int] = {}

    def compute_loss(self: ThriftyTrainer, model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
        loss = real(self, model, inputs, **kwargs)
        now = self.state.global_step + 1
        parts[now] = parts.get(now, -1) + 1
        if now == step and parts[now] == part:
            seen.append((self, {name: tensor.clone() for name, tensor in inputs.items()}))
            return loss * value
        return loss

    patch.setattr(ThriftyTrainer, "compute_loss", compute_loss)
    return seen


def prompts(inputs: dict[str, Tensor], folder: Path) -> set[str]:
    """The prompts in a batch, of which a token is a character."""
    letters = {i: t for t, i in json.loads((folder / "model" / "tokenizer.json").read_text())["model"]["vocab"].items()}
    texts = ("".join(letters[int(i)] for i in row if int(i) > 3) for row in inputs["input_ids"])
    return {text.split("=")[0] for text in texts}


def named(message: str, folder: Path) -> set[str]:
    """The prompts of the rows that a message names."""
    lines = (folder / "train.jsonl").read_text().splitlines()
    places = [word.strip(",:;") for word in message.split() if word.startswith(str(folder / "train.jsonl"))]
    return {json.loads(lines[int(place.rpartition(":")[2]) - 1])["prompt"].removesuffix("=") for place in places}


CASES: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 0),
    "second epoch": ({"num_train_epochs": 2, "max_steps": 8, "train_sampling_strategy": "group_by_length"}, 0),
    "second part": ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, 1),
    "packed": ({"packing": True, "per_device_train_batch_size": 2, "max_length": 40}, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_a_loss_that_is_not_finite_names_its_rows_and_changes_nothing(
    case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, part = CASES[case]
    step = 8 if case == "second epoch" else 3
    seen = spoiled(monkeypatch, step=step, part=part)
    with pytest.raises(ThriftyError, match=f"the training loss is nan at step {step}, in rows ") as caught:
        train(configuration(folder, save_steps=1, output_dir=str(tmp_path), **changes))
    message = str(caught.value)
    assert "\n" not in message
    assert "no value was changed by it" in message
    assert "nonfinite=skip" in message
    ((trainer, inputs),) = seen
    if case == "packed":
        assert prompts(inputs, folder) <= named(message, folder) or " more" in message
    else:
        assert named(message, folder) == prompts(inputs, folder)
    last = checkpoints(tmp_path)[-1]
    assert last.step == step - 1
    for name, value in trainer.tuning.state().items():
        assert torch.equal(value, last.values()[name]), name


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_passed_over(
    fault: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if fault == "loss":
        spoiled(monkeypatch, step=4, value=float("inf"))
    else:
        real = ThriftyTrainer.training_step

        def training_step(self: ThriftyTrainer, *args: Any, **kwargs: Any) -> Any:
            loss = real(self, *args, **kwargs)
            if self.state.global_step == 3:
                next(iter(self.tuning.named_leaves().values())).grad[0] = torch.inf
            return loss

        monkeypatch.setattr(ThriftyTrainer, "training_step", training_step)
    changes = {"save_steps": 1, "save_total_limit": 9, "max_steps": 6, "nonfinite": "skip", "logging_steps": 2}
    with caplog.at_level(logging.WARNING, logger="thrifty"):
        run = train(configuration(folder, output_dir=str(tmp_path), **changes))
    assert run.summary["skipped_steps"] == 1
    (said,) = [line for line in caplog.messages if "passed over" in line]
    assert said.startswith(f"step 4 is passed over: the {'training loss is inf' if fault == 'loss' else 'gradient'}")
    assert len(named(said, folder)) == 4  # the rows of its batch
    saved = {c.step: c.folder for c in checkpoints(tmp_path)}
    for name in ("values.safetensors", "optimizer.safetensors"):
        three, four, five = ((saved[step] / name).read_bytes() for step in (3, 4, 5))
        assert three == four != five
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert all(4 < loss < 6 for loss in losses.values()), losses  # step 4's is the mean of step 3 alone
    assert [line.get("skipped_steps", 0) for line in lines if "loss" in line] == [0, 0, 1, 1]
    shutil.rmtree(saved[6])
    (tmp_path / "summary.json").unlink()
    again = train(configuration(folder, output_dir=str(tmp_path), resume_from_checkpoint="auto", **changes))
    assert again.summary["skipped_steps"] == 1


def test_a_run_that_loses_every_step_ends(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ThriftyTrainer.compute_loss
    monkeypatch.setattr(ThriftyTrainer, "compute_loss", lambda self, *a, **k: real(self, *a, **k) * torch.nan)
    with pytest.raises(ThriftyError, match=r"at step 10, in rows .*, the 10th in a row: lower learning_rate"):
        train(configuration(folder, output_dir=str(tmp_path), max_steps=20, nonfinite="skip", save_strategy="no"))


def test_the_loss_scale_of_fp16_finds_its_size() -> None:
    """An infinite gradient under a scaler is the scaler's affair; a loss that is not finite is ours."""
    updates: list[int] = []
    synced: list[bool] = []
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(learning_rate=0.1),
        state=SimpleNamespace(global_step=6),
        accelerator=SimpleNamespace(
            scaler=SimpleNamespace(update=lambda: updates.append(1)),
            gradient_state=SimpleNamespace(_set_sync_gradients=synced.append),
        ),
        _tr_loss=torch.tensor(2.0),
        _globalstep_last_logged=5,
        rows_of_step=lambda parts: ["a.jsonl:1"],
    )
    steps = FiniteSteps(trainer, skips=True)
    steps.begin()
    steps.note(torch.tensor(1.0), [True])
    steps.norm = torch.tensor(torch.inf)
    steps.before_step()
    assert not steps.skipping
    steps.note(torch.tensor(torch.nan), [False])
    trainer._tr_loss += torch.nan
    steps.before_step()
    steps.end()
    assert (steps.skipped, updates, synced, trainer._tr_loss.item()) == (1, [1], [False, True], 2.0)


@pytest.mark.parametrize(
    ("allocate", "said"),
    [
        (
            lambda: torch.empty(2**55, dtype=torch.uint8),
            r"out of memory \(asked for 33554432\.00 GiB\): the estimate for",
        ),
        (lambda: bytearray(2**62), "out of memory: the estimate for"),
    ],
)
def test_too_little_memory_is_one_line(
    allocate: Callable[[], Any], said: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ThriftyTrainer, "training_step", lambda *args, **kwargs: allocate())
    with pytest.raises(ThriftyError, match=said) as caught:
        train(configuration(folder, output_dir=str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert "_checkpointing=true" in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's address space")
def test_a_process_with_too_little_memory_says_what_fits(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "1+1=", "completion": "2" * 120}] * 4096
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    limited = """if True:
        import resource, sys
        import psutil
        from thrifty.cli.main import main
        import thrifty.run.train, transformers.models.llama.modeling_llama
        limit = psutil.Process().memory_info().vms + 300 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.exit(main(sys.argv[1:]))
    """
    values = configuration(folder, per_device_train_batch_size=4096, output_dir=str(tmp_path / "out"))
    values["data"] = {"train": str(tmp_path / "rows.jsonl")}
    (tmp_path / "run.yaml").write_text(json.dumps(values | {"eval": {}}))
    command = [sys.executable, "-c", limited, "train", str(tmp_path / "run.yaml")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 2, found.stderr
    assert re.fullmatch(r"thrifty: out of memory \(asked for .*\): .*\n", found.stderr), found.stderr


def test_an_error_that_is_not_memory_keeps_its_trace(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(ThriftyTrainer, "training_step", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(configuration(folder, output_dir=str(tmp_path)))
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "metrics.jsonl"}


def test_a_run_is_repeated_from_its_summary(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit-identical, and told what is not as it was: then nothing, then a file, a version and what was changed."""
    first, again, third = (str(tmp_path / name) for name in ("first", "again", "third"))
    data = {"train": str(tmp_path / "rows.jsonl"), "eval": str(folder / "eval.jsonl")}
    shutil.copy(folder / "train.jsonl", data["train"])
    train(configuration(folder, output_dir=first, data=data, save_steps=5))
    summary = json.loads(Path(first, "summary.json").read_text())
    assert set(summary["files"]["data.train"]) == {data["train"]}
    assert len(summary["fingerprints"]) == 3
    assert summary["config"]["learning_rate"] == 0.01
    capsys.readouterr()
    assert main(["train", "--from", f"{first}/summary.json", f"output_dir={again}"]) == 0
    assert "repeating a run: versions, machine, model and data are the same" in capsys.readouterr().out
    assert result(Path(again)) == result(Path(first))
    heading = [line for line in Path(again, "run.yaml").read_text().splitlines() if line.startswith("# ")]
    assert f"data.train sha256 {summary['fingerprints']['data.train']}" in "\n".join(heading)

    rows = Path(data["train"])
    rows.write_text(rows.read_text().replace("+", "-", 1))
    summary["versions"]["torch"] = "1.0"
    Path(first, "summary.json").write_text(json.dumps(summary))
    assert main(["train", "--from", first, f"output_dir={third}", "max_steps=1", "save_strategy=no"]) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("repeating a run: "))
    for part in ("max_steps: 10 -> 1", "torch 1.0 -> ", f"the rows of data.train ({data['train']})"):
        assert part in said
    assert "data.eval" not in said
    assert main(["train", "--from", first]) == 2
    assert "holds a finished run; give another one" in capsys.readouterr().err
    assert main(["train", "--from", f"{first}/run.yaml", "output_dir=x"]) == 2
    assert "is not the summary of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        ("mkdir", PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        ("open", OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
    ],
)
def test_a_folder_that_cannot_be_written_is_said_before_the_model_is_loaded(
    call: str, error: OSError, said: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).startswith(str(tmp_path)):
            raise error
        return real(path, *args, **kwargs)

    real = getattr(os, call)
    monkeypatch.setattr(os, call, refuse)
    monkeypatch.setattr("thrifty.run.train.load_tokenizer", None)
    with pytest.raises(ThriftyError) as caught:
        train(configuration(folder, output_dir=str(tmp_path / "out" if call == "mkdir" else tmp_path)))
    out = tmp_path / "out" if call == "mkdir" else tmp_path
    assert str(caught.value) == f"could not write {out}: {said}; give another output_dir"


@pytest.mark.parametrize(
    ("setting", "fix"),
    [
        ("model=nobody/nothing", "give a folder, or fetch it where the hub can be reached: hf download nobody/nothing"),
        ("data.train=nobody/rows", "give a file, or fetch it where the hub can be reached"),
    ],
)
def test_a_hub_that_does_not_answer_is_one_line(
    setting: str,
    fix: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "run.yaml").write_text(load_config(configuration(folder)).to_yaml())
    assert main(["train", str(tmp_path / "run.yaml"), f"output_dir={tmp_path}/out", setting]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("thrifty: "))
    assert setting.partition("=")[2] in line
    assert line.endswith(fix)
    assert not (tmp_path / "out").exists()
