"""Runs that are killed for good, or that the kernel refuses to write for, in processes of their own."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_resume import result
from tiny_run import configuration, prepare, start

from thrifty.run.checkpoint import checkpoints

_KILLS = int(os.environ.get("THRIFTY_TEST_KILLS", "25"))  # of each of two runs


def _train(config: dict[str, Any], kill_at: int | None) -> None:
    """Train; at the `kill_at`-th file that is opened, renamed or removed, or micro-batch that is begun, die at once."""
    from thrifty.run.train import train
    from thrifty.run.trainer import ThriftyTrainer

    seen = 0
    gc.freeze()  # collecting garbage need not search what importing made

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and config["output_dir"] in str(
            arguments[0]
        ):
            count()

    real = ThriftyTrainer.training_step

    def training_step(self: ThriftyTrainer, *args: Any, **kwargs: Any) -> Any:
        count()
        return real(self, *args, **kwargs)

    sys.addaudithook(audit)
    ThriftyTrainer.training_step = training_step  # type: ignore[method-assign]
    train(config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_at_random_moments(dtype: str, tmp_path: Path) -> None:
    prepare(tmp_path, dropout=0.1)
    changes = {"dtype": dtype, "save_steps": 2, "eval_steps": 3, "resume_from_checkpoint": "auto"}
    whole = start(_train, configuration(tmp_path, **changes, output_dir=str(tmp_path / "whole")), None)
    config = configuration(tmp_path, **changes)
    draw = random.Random(dtype)
    whole.join()
    assert whole.exitcode == 0
    expected = result(tmp_path / "whole")
    kills = ends = 0
    while kills < _KILLS or ends == 0:
        timed = kills % 3 == 2  # the others die exactly at an event, most of them inside a save
        child = start(_train, config, None if timed or kills == _KILLS else draw.randrange(1, 120))
        if timed and kills < _KILLS:
            time.sleep(draw.random())
            child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        kills += child.exitcode != 0
        if child.exitcode == 0:
            found = result(tmp_path / "out")
            for key in expected:
                assert found[key] == expected[key], key
            assert not list((tmp_path / "out").glob(".*"))
            shutil.rmtree(tmp_path / "out")  # the next run is killed from its beginning on
            ends += 1
    print(f"{kills} kills, {ends} runs that reached their end, each bit-identical to the one that nobody killed")


def _limited(file: str, errors: str) -> None:
    """`thrifty train` where no file may grow beyond 30 kB once the first checkpoint is there."""
    import resource

    import thrifty.run.saving as saving
    from thrifty.cli.main import main

    real = saving.write_checkpoint

    def write(folder: Path, **parts: Any) -> None:
        if folder.name == "checkpoint-4":
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
        real(folder, **parts)

    saving.write_checkpoint = write  # type: ignore[assignment]
    sys.stderr = open(errors, "w")  # noqa: SIM115
    code = main(["train", file])
    sys.stderr.close()
    os._exit(code)


def test_a_file_that_may_not_grow_while_saving(tmp_path: Path) -> None:
    """The kernel's own error, through the command line: one line, exit code 2, the previous checkpoint whole."""
    from thrifty.run.config import load_config

    prepare(tmp_path)
    config = configuration(tmp_path, method="full", budget=None, save_steps=2, max_steps=4, optim="sgd")
    (tmp_path / "run.yaml").write_text(load_config(config).to_yaml())
    child = start(_limited, str(tmp_path / "run.yaml"), str(tmp_path / "errors"))
    child.join()
    assert child.exitcode == 2
    (line,) = (tmp_path / "errors").read_text().splitlines()
    assert "File too large; checkpoint-2 is whole: free space and go on with resume_from_checkpoint=auto" in line
    assert [c.step for c in checkpoints(tmp_path / "out")] == [2]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"run.yaml", "metrics.jsonl", "checkpoint-2"}
    child = start(_train, {**config, "resume_from_checkpoint": "auto"}, None)
    child.join()
    assert [c.step for c in checkpoints(tmp_path / "out")] == [2, 4]
