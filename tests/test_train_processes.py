"""Two processes train as one does with the same global batch, and resume."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import result
from test_stop import signalled
from tiny_run import configuration, prepare, start

from thrifty.run.checkpoint import checkpoints
from thrifty.run.lost import warn_of_old_addresses
from thrifty.run.metrics import read_metrics
from thrifty.run.train import train
from thrifty.run.trainer import ThriftyTrainer


def _rank(rank: int, port: int, configs: list[dict[str, Any]]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for config in configs:
        train(config)
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Past the end of an epoch, whose last batch is short: no row counts twice."""
    prepare(tmp_path)
    changes = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "eval_steps": 4,
        "max_steps": 8,
        "logging_steps": 1,
    }
    changes |= {"train_sampling_strategy": "group_by_length"}
    train(configuration(tmp_path, **changes, per_device_eval_batch_size=8))
    halves = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "output_dir": str(tmp_path / "two")}
    split = configuration(tmp_path, **{**changes, **halves})
    resumed = {**split, "resume_from_checkpoint": "auto"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(_rank, rank, port, [{**split, "max_steps": 4}, resumed]) for rank in range(2)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]

    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("out", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    # Two rows without labels fill the epoch up for two processes of two rows: two tokens more.
    seen = [max(line.get("tokens", 0) for line in lines) for lines in (one, two)]
    assert seen[1] == seen[0] + 2
    for name in ("loss", "eval_loss"):
        assert [line.get(name, 0) for line in two] == pytest.approx([line.get(name, 0) for line in one], rel=1e-5), name
    expected, found = (checkpoints(tmp_path / name)[-1].values() for name in ("out", "two"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)


def _told(rank: int, port: int, config: dict[str, Any]) -> None:
    if rank == 1:
        signalled(pytest.MonkeyPatch(), ThriftyTrainer, "training_step", call=3, number=signal.SIGTERM)
    _rank(rank, port, [config])


def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path: Path) -> None:
    prepare(tmp_path)
    changes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "eval_steps": 3}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(_told, rank, port, configuration(tmp_path, **changes)) for rank in range(2)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [143, 143]
    (saved,) = checkpoints(tmp_path / "out")
    assert saved.step == 3
    assert len(saved.state("random")) == 2


LOSING = """if True:
    import os, signal, sys
    from thrifty.cli.main import main
    from thrifty.run.trainer import ThriftyTrainer
    real = ThriftyTrainer.training_step
    def training_step(self, *args, **kwargs):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and os.environ["RANK"] == "1" and self.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args, **kwargs)
    ThriftyTrainer.training_step = training_step
    sys.exit(main(sys.argv[1:]))
"""


def torchrun(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=300)


def test_a_process_that_is_lost(tmp_path: Path) -> None:
    """The other one ends with one line; started again, both go on from the last checkpoint, to the same result."""
    prepare(tmp_path)
    halves = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "save_steps": 2}
    (tmp_path / "losing.py").write_text(LOSING)
    (tmp_path / "run.yaml").write_text(json.dumps(configuration(tmp_path, **halves)))
    undisturbed = configuration(tmp_path, **halves, output_dir=str(tmp_path / "calm"))
    (tmp_path / "calm.yaml").write_text(json.dumps(undisturbed))

    again = ["train", str(tmp_path / "run.yaml"), "resume_from_checkpoint=auto"]
    lost = torchrun(str(tmp_path / "losing.py"), *again)
    assert lost.returncode != 0
    assert "thrifty: another process is gone, its own output says why; " in lost.stderr
    assert f"{tmp_path}/out/checkpoint-4 is whole" in lost.stderr
    resumed = torchrun("-m", "thrifty", *again)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step 4" in resumed.stdout
    assert torchrun("-m", "thrifty", "train", str(tmp_path / "calm.yaml")).returncode == 0
    one, two = result(tmp_path / "out"), result(tmp_path / "calm")
    for found, expected in zip(one.pop("metrics"), two.pop("metrics"), strict=True):
        assert found == pytest.approx(expected)
    assert one == two


def test_torchrun_starts_a_lost_process_again(tmp_path: Path) -> None:
    """With a store of its own for each attempt: the second one goes on from the last checkpoint, sharded as before."""
    prepare(tmp_path)
    halves = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "save_steps": 2, "logging_steps": 1}
    (tmp_path / "losing.py").write_text(LOSING)
    (tmp_path / "run.yaml").write_text(json.dumps(configuration(tmp_path, **halves, fsdp=True)))
    words = ["train", str(tmp_path / "run.yaml"), "resume_from_checkpoint=auto"]
    own = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = torchrun("--max-restarts=1", str(tmp_path / "losing.py"), *words, **own)
    assert done.returncode == 0, done.stderr
    assert "another process is gone" in done.stderr
    assert "resuming at step 4" in done.stdout
    assert "would meet the addresses" not in done.stderr
    steps = [line["step"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 11))


def test_restarts_on_one_store_are_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name, value in {"MAX_RESTARTS": "3", "USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("RANK", "0")
    warn_of_old_addresses()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    warn_of_old_addresses()
    (said,) = caplog.messages
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in said


def test_accelerate_launch(tmp_path: Path) -> None:
    """As torchrun does: two processes, whose plan and losses are one process's. `--multi_gpu` starts them, here without
    GPUs; with `--cpu` accelerate starts one, whatever `--num_processes` says."""
    prepare(tmp_path)
    changes = {"max_steps": 4, "logging_steps": 1, "gradient_checkpointing": True}
    train(configuration(tmp_path, **changes, output_dir=str(tmp_path / "one")))
    halves = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4}
    (tmp_path / "run.yaml").write_text(json.dumps(configuration(tmp_path, **changes, **halves, fsdp=True)))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command += ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}"]
    command += ["-m", "thrifty", "train", str(tmp_path / "run.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}  # none of the user's configurations
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "out"))
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (first, second)]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    plans = [checkpoints(tmp_path / name)[-1].plan().digest() for name in ("one", "out")]
    assert plans[0] == plans[1]
    record = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert record["machine"]["processes"] == 2
