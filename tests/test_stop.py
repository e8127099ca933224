"""Signals: a run saves what it has and leaves, or leaves at once; and it ends as if it had never stopped."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_resume import result
from tiny_run import configuration, prepare, start

from thrifty.core.errors import ThriftyError
from thrifty.run.checkpoint import checkpoints
from thrifty.run.eval_loss import EvalLoss
from thrifty.run.lock import LOCK, locked
from thrifty.run.train import train
from thrifty.run.trainer import ThriftyTrainer

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its rows, and `whole`, a run that nobody stopped."""
    made = prepare(tmp_path_factory.mktemp("stopped"), dropout=0.1)
    train(configuration(made, **CHANGES, output_dir=str(made / "whole")))
    return made


CHANGES: dict[str, Any] = {"save_steps": 100, "eval_steps": 2, "per_device_eval_batch_size": 3}


def signalled(patch: pytest.MonkeyPatch, kind: Any, method: str, *, call: int, number: int) -> None:
    """The process gets `number` in the `call`-th call of a method."""
    real, calls = getattr(kind, method), []

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return real(self, *args, **kwargs)

    patch.setattr(kind, method, counted)


def test_a_signal_saves_and_leaves(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step, in an evaluation, in the last step of an epoch, and in the evaluation behind it."""
    config = configuration(folder, **CHANGES, output_dir=str(tmp_path), resume_from_checkpoint="auto")
    before = [signal.getsignal(number) for number in SIGNALS]
    # of ten steps, six to an epoch: in step 3; in the evaluation of step 4 (its second batch; the first is tried at
    # the start); in step 6, the last of the epoch; in the evaluation of step 8
    stops = [
        (ThriftyTrainer, "training_step", 3, signal.SIGTERM, SystemExit, 3),
        (EvalLoss, "_sum", 3, signal.SIGINT, KeyboardInterrupt, 4),
        (ThriftyTrainer, "training_step", 2, signal.SIGTERM, SystemExit, 6),
        (EvalLoss, "_sum", 2, signal.SIGTERM, SystemExit, 8),
    ]
    for kind, method, call, number, raised, step in stops:
        with monkeypatch.context() as patch:
            signalled(patch, kind, method, call=call, number=number)
            began = time.monotonic()
            with pytest.raises(raised) as caught:
                train(config)
            assert time.monotonic() - began < 10
        if number == signal.SIGTERM:
            assert caught.value.code == 143
        assert checkpoints(tmp_path)[-1].step == step
        assert [signal.getsignal(number) for number in SIGNALS] == before
        assert not (tmp_path / LOCK).exists()
    train(config)
    expected, found = result(folder / "whole"), result(tmp_path)
    for key in expected:
        assert found[key] == expected[key], key


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_where_nothing_can_be_saved_the_run_is_left_at_once(
    strategy: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With save_strategy=no in a step; otherwise while the model is loaded."""
    kind, method = (ThriftyTrainer, "training_step") if strategy == "no" else (ThriftyTrainer, "__init__")
    signalled(monkeypatch, kind, method, call=1, number=signal.SIGTERM)
    out = tmp_path / "new" / "out"
    with pytest.raises(SystemExit) as caught:
        train(configuration(folder, output_dir=str(out), save_strategy=strategy))
    assert caught.value.code == 143
    said = {"no": "save_strategy is no, so nothing was kept", "steps": "stopped before the first checkpoint"}
    assert said[strategy] in capsys.readouterr().out
    assert not checkpoints(out)


def test_in_another_thread_signals_are_left_alone(folder: Path, tmp_path: Path) -> None:
    before, seen = [signal.getsignal(number) for number in SIGNALS], []

    def run() -> None:
        seen.append(train(configuration(folder, output_dir=str(tmp_path), max_steps=1, save_strategy="no")))

    worker = threading.Thread(target=run)
    worker.start()
    worker.join()
    assert len(seen) == 1
    assert [signal.getsignal(number) for number in SIGNALS] == before


def _command(folder: str, number: int, twice: bool) -> None:
    """`thrifty train`, signalled in its third step; with `twice`, again while it saves."""
    import thrifty.run.saving as saving
    from thrifty.cli.main import main
    from thrifty.run.config import load_config

    patch = pytest.MonkeyPatch()
    signalled(patch, ThriftyTrainer, "training_step", call=3, number=number)
    if twice:

        def write(*args: Any, **kwargs: Any) -> None:
            os.kill(os.getpid(), number)
            raise AssertionError("the second signal was to end the process")

        saving.write_checkpoint = write  # type: ignore[assignment]
    config = configuration(Path(folder), output_dir=f"{folder}/{number}{twice}")
    file = Path(folder) / f"run{number}{twice}.yaml"
    file.write_text(load_config(config).to_yaml())
    sys.exit(main(["train", str(file)]))


def test_exit_codes_and_the_second_signal(folder: Path) -> None:
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        child = start(_command, str(folder), int(number), False)
        child.join()
        assert child.exitcode == code
        assert [c.step for c in checkpoints(folder / f"{int(number)}False")] == [3]
    child = start(_command, str(folder), int(signal.SIGINT), True)
    child.join()
    assert child.exitcode == -signal.SIGINT
    assert not checkpoints(folder / f"{int(signal.SIGINT)}True")


def _hold(folder: str) -> None:
    with locked(Path(folder)):
        Path(folder, "held").touch()
        time.sleep(60)


def test_two_runs_do_not_share_a_folder(folder: Path, tmp_path: Path) -> None:
    child = start(_hold, str(tmp_path / "out"))
    while not (tmp_path / "out" / "held").exists():
        time.sleep(0.01)
    config = configuration(folder, output_dir=str(tmp_path / "out"), max_steps=1)
    with pytest.raises(ThriftyError, match=rf"is in use by process {child.pid} on .*: wait for its end, or give"):
        train(config)
    child.kill()
    child.join()
    assert (tmp_path / "out" / LOCK).exists()  # a dead run's lock does not hold
    assert train(config).summary["steps"] == 1
    assert not (tmp_path / "out" / LOCK).exists()


def test_a_lock_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(ThriftyError, match=f"in use by process {os.getpid()}"), locked(tmp_path / "a" / "b"):
            pass
        if (child := os.fork()) == 0:  # as a data loader's process, which may outlive the run
            time.sleep(30)
            os._exit(0)
    try:
        with locked(tmp_path / "a"):
            pass
        with locked(tmp_path / "a" / "b"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import errno
    import fcntl

    def none(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path):
        pass
    (said,) = caplog.messages
    assert "this file system has no locks: see to it that no other run uses the folder" in said
