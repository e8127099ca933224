"""Checkpoints that were damaged after they were written, and disks that are full at any write."""

from __future__ import annotations

import builtins
import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import result
from tiny_run import configuration, prepare

from thrifty.core.errors import ThriftyError
from thrifty.core.plan import Plan
from thrifty.core.region import Whole
from thrifty.run.checkpoint import checkpoints, claim, find_checkpoint, write_checkpoint
from thrifty.run.train import train


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with checkpoints of steps 2 and 4."""
    folder = prepare(tmp_path_factory.mktemp("damaged"))
    train(configuration(folder, save_steps=2, max_steps=4))
    assert [c.step for c in checkpoints(folder / "out")] == [2, 4]  # two are kept unasked
    return folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_any_damaged_file_falls_back_to_the_one_before(
    damage: Callable[[Path], None], whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = sorted(file.name for file in (whole / "out" / "checkpoint-4").iterdir())
    assert len(names) >= 10
    for name in names:
        out = tmp_path / name
        shutil.copytree(whole / "out", out)
        if (damage, name) == (cut, "complete.json"):  # its last byte is the end of its last line
            cut(out / "checkpoint-4" / name)
        damage(out / "checkpoint-4" / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="thrifty"):
            found = find_checkpoint("auto", output_dir=out)
        assert found is not None
        assert found.step == 2, name
        (said,) = caplog.messages
        assert "\n" not in said
        assert re.search(r"checkpoint-4 is damaged \(\w+\.(json|safetensors) .*\); going on with .*-2$", said)
        with pytest.raises(ThriftyError, match=r"no complete checkpoint: .* \(complete ones there: .*checkpoint-2"):
            find_checkpoint(str(out / "checkpoint-4"), output_dir=out)
        damage(out / "checkpoint-2" / "values.safetensors")
        with pytest.raises(ThriftyError, match="none is left to go on with; put back a copy, or remove") as caught:
            find_checkpoint("auto", output_dir=out)
        assert "\n" not in str(caught.value)


def test_a_run_goes_on_from_the_one_before_and_ends_the_same(whole: Path, tmp_path: Path) -> None:
    expected = result(whole / "out")
    shutil.copytree(whole / "out", tmp_path / "out")
    flip(tmp_path / "out" / "checkpoint-4" / "optimizer.safetensors")
    changes = {"save_steps": 2, "max_steps": 4, "resume_from_checkpoint": "auto"}
    train(configuration(whole, output_dir=str(tmp_path / "out"), **changes))
    assert result(tmp_path / "out") == expected
    assert [c.step for c in checkpoints(tmp_path / "out")] == [2, 4]


def test_a_damaged_best_checkpoint_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learning rate makes the loss rise again; the values of the best step are damaged before they are taken."""
    import thrifty.run.trainer as trainer

    real = trainer.ThriftyTrainer.note_result

    def note_result(self: Any, *, best: bool) -> None:
        flip(Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}" / "values.safetensors")
        real(self, best=best)

    prepare(tmp_path)
    changes = {"max_steps": 60, "eval_steps": 1, "learning_rate": 0.3, "early_stopping_patience": 3}
    with monkeypatch.context() as patch:
        patch.setattr(trainer.ThriftyTrainer, "note_result", note_result)
        with pytest.raises(ThriftyError, match=r"whose values are the best, is damaged .*load_best_model_at_end=false"):
            train(configuration(tmp_path, **changes))
    again = {"resume_from_checkpoint": "auto", "load_best_model_at_end": False}
    run = train(configuration(tmp_path, **changes, **again))
    assert run.summary["result_step"] == run.summary["steps"]


@pytest.fixture
def full_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[str]]]:
    """`full_at(n)`: the n-th write from now on finds the disk full; returns the list that names each write."""
    import safetensors.torch

    import thrifty.run.checkpoint as checkpoint_module
    import thrifty.run.state as state_module

    places: list[tuple[Any, str, Callable[[tuple[Any, ...]], bool]]] = [
        (builtins, "open", lambda args: len(args) > 1 and str(args[1])[:1] in "wxa"),
        (Path, "write_text", lambda args: True),
        (os, "fsync", lambda args: True),
        (os, "rename", lambda args: True),
        (os, "replace", lambda args: True),
        (Path, "mkdir", lambda args: True),
        (checkpoint_module, "save_file", lambda args: True),
        (state_module, "save_file", lambda args: True),
    ]
    assert safetensors.torch.save_file is checkpoint_module.save_file

    def arm(number: int) -> list[str]:
        calls: list[str] = []
        monkeypatch.undo()
        for place, name, counts in places:
            real = getattr(place, name)

            def write(*args: Any, real: Any = real, name: str = name, counts: Any = counts, **kwargs: Any) -> Any:
                if counts(args):
                    calls.append(name)
                    if len(calls) == number:
                        raise OSError(errno.ENOSPC, "No space left on device")
                return real(*args, **kwargs)

            monkeypatch.setattr(place, name, write)
        return calls

    yield arm
    monkeypatch.undo()


def test_a_disk_that_is_full_at_any_write_leaves_the_checkpoint_before(
    full_at: Callable[[int], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"w": torch.arange(6.0)}
    plan = Plan({"w": Whole()}, shapes={"w": (2, 3)}, total=6)

    def save(step: int) -> None:
        states = {"optimizer": {"m": torch.ones(3)}, "scheduler": {"x": 1}, "random": [torch.zeros(4)]}
        parts = {"plan": plan, "states": states, "trainer_state": "{}", "record": {}}
        write_checkpoint(tmp_path / f"checkpoint-{step}", values=values, **parts)

    save(1)
    writes = full_at(0)
    save(2)
    count = len(writes)
    assert count > 20, writes
    shutil.rmtree(tmp_path / "checkpoint-2")
    for number in range(1, count + 1):
        full_at(number)
        with pytest.raises(ThriftyError, match="No space left on device; checkpoint-1 is whole: free space") as caught:
            save(2)
        full_at(0)
        assert "\n" not in str(caught.value)
        found = find_checkpoint("auto", output_dir=tmp_path)
        assert found is not None
        if number < count:  # the last write is the folder's own entry: the checkpoint is there, and whole
            assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"], (number, writes[number - 1])
    with pytest.raises(ThriftyError, match="a run stopped after step"):
        claim(tmp_path, resume=None)
    print(f"{count} writes, each of which found the disk full once")
