"""Checkpoints: whole or absent, small, and without pickle."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import configuration, prepare
from torch import nn
from transformers import get_scheduler
from transformers.optimization import Adafactor

import thrifty.run.checkpoint as checkpoint_module
from thrifty.core.errors import ThriftyError
from thrifty.core.files import new_folder, write_text
from thrifty.run.checkpoint import checkpoints, find_checkpoint, remove_old
from thrifty.run.metrics import MetricsFile, read_metrics
from thrifty.run.state import (
    load_optimizer_state,
    load_scheduler_state,
    load_state,
    optimizer_state,
    random_state,
    save_state,
    set_random_state,
)
from thrifty.run.train import train

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adafactor": lambda p: Adafactor(p, lr=0.1, relative_step=False, scale_parameter=False),
    "groups": lambda p: torch.optim.Adam([{"params": p[:1], "lr": 0.5}, {"params": p[1:]}], lr=0.1, amsgrad=True),
}


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_scheduler_and_random_states_come_back_exactly(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=9)
    for _ in range(3):
        _step(model, optimizer, scheduler)
    leaves = dict(model.named_parameters())
    values = {key: value.detach().clone() for key, value in leaves.items()}
    save_state(tmp_path / "optimizer", optimizer_state(optimizer, leaves))
    save_state(tmp_path / "scheduler", scheduler.state_dict())
    save_state(tmp_path / "random", [random_state()])
    drawn = [random.random(), np.random.rand(), np.random.randn()]
    for _ in range(3):
        _step(model, optimizer, scheduler)
    expected = {key: value.detach().clone() for key, value in leaves.items()}

    for key, value in leaves.items():
        value.data.copy_(values[key])
    again = OPTIMIZERS[name](list(model.parameters()))
    scheduler = get_scheduler("cosine", again, num_warmup_steps=1, num_training_steps=9)
    load_optimizer_state(again, load_state(tmp_path / "optimizer"), leaves)
    load_scheduler_state(scheduler, load_state(tmp_path / "scheduler"))
    set_random_state(load_state(tmp_path / "random")[0])
    assert drawn == [random.random(), np.random.rand(), np.random.randn()]
    for _ in range(3):
        _step(model, again, scheduler)
    for key, value in leaves.items():
        assert torch.isfinite(value).all()
        assert torch.equal(value, expected[key]), key
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json"] * 3 + [".safetensors"] * 2


def test_optimizer_state_follows_the_names(tmp_path: Path) -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([a, b])
    a.grad, b.grad = torch.full((2,), 2.0), torch.full((3,), 3.0)
    optimizer.step()
    save_state(tmp_path / "o", optimizer_state(optimizer, {"a": a, "b": b}))
    swapped = torch.optim.Adam([b, a])
    load_optimizer_state(swapped, load_state(tmp_path / "o"), {"a": a, "b": b})
    assert torch.equal(swapped.state[a]["exp_avg"], optimizer.state[a]["exp_avg"])
    assert torch.equal(swapped.state[b]["exp_avg"], optimizer.state[b]["exp_avg"])
    with pytest.raises(ThriftyError, match="is not in both"):
        load_optimizer_state(swapped, load_state(tmp_path / "o"), {"a": a, "c": b})


def test_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ThriftyError, match=r"o\.state holds a set"):
        save_state(tmp_path / "o", {"state": {1, 2}})


def test_a_checkpoint_is_small_and_holds_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path)
    config = configuration(tmp_path, method={"smt": {"block_size": 16}}, budget=0.5, max_steps=4, save_steps=2)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickle")

    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    run = train(config)
    folder = checkpoints(tmp_path / "out")[-1].folder
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".json", ".jsonl", ".safetensors", ".yaml"}
    trained = run.summary["trainable_parameters"]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 24 * trained + 40_000
    train({**config, "max_steps": 6, "resume_from_checkpoint": "auto"})


def test_only_whole_checkpoints_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(step: int, best: int | None = None) -> Path:
        with new_folder(tmp_path / f"checkpoint-{step}", marker="complete.json") as partial:
            (partial / "values").write_text("12345")
            (partial / "trainer_state.json").write_text(json.dumps({"best_global_step": best}))
        return tmp_path / f"checkpoint-{step}"

    folders = [write(step) for step in (2, 9, 10)]
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert [c.step for c in checkpoints(tmp_path)] == [2, 9, 10]
    (folders[2] / "values").write_text("123")  # cut
    (folders[1] / "complete.json").unlink()  # never finished
    with caplog.at_level(logging.WARNING, logger="thrifty"):
        newest = find_checkpoint("auto", output_dir=tmp_path)
    assert newest is not None
    assert newest.step == 2
    (said,) = caplog.messages
    for part in ("checkpoint-11 is damaged (complete.json is missing)", "values has 3 bytes, not 5", "going on with"):
        assert part in said
    with pytest.raises(ThriftyError, match=r"values has 3 bytes, not 5 \(complete ones there: .*checkpoint-2\)"):
        find_checkpoint(str(folders[2]), output_dir=tmp_path)
    assert find_checkpoint(None, output_dir=tmp_path) is None
    with pytest.raises(ThriftyError, match="holds no complete checkpoint"):
        find_checkpoint(True, output_dir=tmp_path / "none")
    for step in (12, 14, 16):
        write(step, best=12)
    remove_old(tmp_path, keep=1)
    assert [c.step for c in checkpoints(tmp_path)] == [12, 16]
    for step in (18, 20):
        write(step, best=18)
    remove_old(tmp_path, keep=3)  # of which 16 would need 12 again
    assert [c.step for c in checkpoints(tmp_path)] == [12, 16, 18, 20]
    remove_old(tmp_path, keep=None)
    assert [c.step for c in checkpoints(tmp_path)] == [18, 20]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(1000, 400, 600))
    write(22)
    remove_old(tmp_path, keep=None)
    assert [c.step for c in checkpoints(tmp_path)] == [22]


def test_a_folder_or_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_text(tmp_path / "file", "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            write_text(tmp_path / "file", "new")
        patch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="No space"), new_folder(tmp_path / "folder"):
            pass
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_metrics_lines_are_whole_and_none_is_twice(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(file, step=0)
    for step in (1, 2, 3):
        metrics.append({"step": step})
    with open(file, "a") as handle:
        handle.write('{"step": 4')  # killed while writing
    assert [line["step"] for line in read_metrics(file)] == [1, 2, 3]
    MetricsFile(file, step=2).append({"step": 3, "again": True})
    assert read_metrics(file) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    assert MetricsFile(file, step=0).path.read_text() == ""


@pytest.mark.parametrize("place", ["save_file", "save_state"])
def test_a_full_disk_leaves_the_previous_checkpoint(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path)
    real = getattr(checkpoint_module, place)
    calls: list[int] = []

    def full(value: Any, path: Any) -> None:
        calls.append(1)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(value, path)

    monkeypatch.setattr(checkpoint_module, place, full)
    with pytest.raises(ThriftyError) as caught:
        train(configuration(tmp_path, save_steps=2))
    _assert_clean(tmp_path / "out", str(caught.value))


def _assert_clean(output: Path, message: str) -> None:
    last = checkpoints(output)[-1].folder
    assert "No space left on device" in message or "File too large" in message
    assert f"{last.name} is whole: free space and go on with resume_from_checkpoint=auto" in message
    assert "\n" not in message.strip()
    kept = {checkpoint.folder.name for checkpoint in checkpoints(output)}
    assert {path.name for path in output.iterdir()} == {"run.yaml", "metrics.jsonl"} | kept
