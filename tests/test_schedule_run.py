"""Plans that change inside a run: resumed exactly, the best checkpoint put back, two processes as one."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import result, stop_in
from tiny_run import configuration, prepare, start

from thrifty.run.checkpoint import checkpoints
from thrifty.run.metrics import read_metrics
from thrifty.run.train import train

CASES: dict[str, dict[str, Any]] = {
    "lisa": {"method": {"lisa": {"layers": 1, "period": 3}}, "budget": None, "weight_decay": 0.1},
    "lisa_bfloat16": {"method": {"lisa": {"layers": 1, "period": 2}}, "budget": None, "dtype": "bfloat16"},
    "hft": {"method": {"hft": {"period": 3}}, "budget": None},
    "lift": {"method": {"lift": {"rank": 4, "refresh": 3}}, "weight_decay": 0.1},
    "lift_bfloat16": {"method": {"lift": {"rank": 4, "refresh": 2}}, "dtype": "bfloat16"},
    "composable_sft": {"method": {"composable_sft": {"phase1": 0.6}}},
    "smt": {"method": {"smt": {"block_size": 8, "reselect_every": 3}}, "weight_decay": 0.1},
    "smt_bfloat16": {"method": {"smt": {"block_size": 8, "reselect_every": 2}}, "dtype": "bfloat16"},
    "entries": {"method": {"custom": {"parts": [{"select": "entries"}], "reselect_every": 3}}},
    "greentrainer": {"method": {"greentrainer": {"period": 5}}, "budget": None, "save_steps": 1},
}
_CHOSEN_AGAIN = ("smt", "smt_bfloat16", "entries")  # by gradients: their plans change by and by


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_uninterrupted(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, dropout=0.1)
    changes = {"save_steps": 2, "learning_rate": 1e-3, **CASES[case]}
    train(configuration(tmp_path, **changes, output_dir=str(tmp_path / "whole")))
    config = configuration(tmp_path, **changes, resume_from_checkpoint="auto")
    for stop in (5, 8):
        with monkeypatch.context() as patch:
            stop_in(patch, stop)
            with pytest.raises(KeyboardInterrupt):
                train(config)
    last = train(config)
    plan = checkpoints(tmp_path / "out")[-1].plan()
    assert last.delta.plan.trainable_parameters > plan.trainable_parameters or case not in _CHOSEN_AGAIN
    expected, found = result(tmp_path / "whole"), result(tmp_path / "out")
    for key in expected:
        assert found[key] == expected[key], key


def test_the_best_checkpoint_comes_back_with_its_own_plan(tmp_path: Path) -> None:
    """A run that gets worse after its first evaluation ends with what it had then, and nothing of what came later."""
    prepare(tmp_path)
    method = {"method": {"hft": {"period": 2}}, "budget": None, "lr_scheduler_type": "constant"}
    worse = {**method, "learning_rate": 0.3, "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    run = train(configuration(tmp_path, **worse, max_steps=8))
    best = run.summary["best_step"]
    assert run.summary["result_step"] == best < 8
    short = train(configuration(tmp_path, **worse, max_steps=best, output_dir=str(tmp_path / "short")))
    expected = dict(short.model.named_parameters())
    for name, p in run.model.named_parameters():
        assert torch.equal(p, expected[name]), name
    run.delta.remove(run.model)
    short.delta.remove(short.model)
    for name, p in run.model.named_parameters():
        assert torch.equal(p, expected[name]), name


def _rank(rank: int, port: int, config: dict[str, Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train(config)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "method",
    [
        {"method": {"hft": {"period": 2}}, "budget": None},
        {"method": {"smt": {"block_size": 8, "reselect_every": 2}}, "budget": 0.1},
    ],
    ids=["hft", "smt"],
)
def test_two_processes_change_the_plan_as_one_does(method: dict[str, Any], tmp_path: Path) -> None:
    prepare(tmp_path)
    changes = {
        **method,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_steps": 6,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
    }
    train(configuration(tmp_path, **changes))
    split = configuration(tmp_path, **changes, output_dir=str(tmp_path / "two")) | {"per_device_train_batch_size": 2}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(_rank, rank, port, split) for rank in range(2)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("out", "two"))
    assert [line.get("loss", 0) for line in two] == pytest.approx([line.get("loss", 0) for line in one], rel=1e-4)
    first, last = (checkpoints(tmp_path / name)[-1] for name in ("out", "two"))
    assert dict(first.plan()) == dict(last.plan())
    for name, value in first.values().items():
        torch.testing.assert_close(last.values()[name], value, rtol=1e-3, atol=1e-6)
    assert first.state("schedule")["step"] == last.state("schedule")["step"] == 6
