"""A checkpoint knows how many processes made it: others are refused, or named where the rows of a step stay."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from test_resume import stop_in
from tiny_run import configuration, prepare

from thrifty.core.errors import ThriftyError
from thrifty.core.files import file_sha256
from thrifty.run.checkpoint import checkpoints
from thrifty.run.train import train


def made_by(folder: Path, processes: int, **changes: Any) -> dict[str, Any]:
    """A run stopped after its checkpoint of step 4, as if `processes` had made it."""
    prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(configuration(folder, save_steps=4, **changes))
    file = checkpoints(folder / "out")[-1].folder / "record.json"
    text = file.read_text(encoding="utf-8")
    assert text.count('"processes": 1') == 1
    file.write_text(text.replace('"processes": 1', f'"processes": {processes}'), encoding="utf-8")
    sums = file.with_name("complete.json")
    written = json.loads(sums.read_text(encoding="utf-8"))
    sums.write_text(json.dumps(written | {file.name: [file.stat().st_size, file_sha256(file)]}), encoding="utf-8")
    return configuration(folder, save_steps=4, resume_from_checkpoint="auto", **changes)


def test_another_number_of_processes_with_other_rows_is_refused(tmp_path: Path) -> None:
    config = made_by(tmp_path, 2)
    with pytest.raises(ThriftyError, match=r"\* processes was 4 \* 1 \* 2 in .* and is 4 \* 1 \* 1: the rows") as error:
        train(config)
    assert "\n" not in str(error.value)
    assert checkpoints(tmp_path / "out")[-1].step == 4


def test_another_number_with_the_same_rows_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = made_by(tmp_path, 2, per_device_train_batch_size=2)
    with caplog.at_level(logging.WARNING, logger="thrifty"):
        run = train(config | {"per_device_train_batch_size": 4})
    assert run.summary["steps"] == 10
    said = [record.getMessage() for record in caplog.records if "processes" in record.getMessage()]
    assert len(said) == 1
    assert "was trained by 2 and goes on with 1" in said[0]
    assert checkpoints(tmp_path / "out")[-1].record()["processes"] == 1


def test_the_same_number_goes_on_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = made_by(tmp_path, 1)
    with caplog.at_level(logging.WARNING, logger="thrifty"):
        assert train(config).summary["steps"] == 10
    assert not [record for record in caplog.records if "processes" in record.getMessage()]
