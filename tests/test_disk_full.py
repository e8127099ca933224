"""A disk that is full at whichever write comes: one line, nothing half-written, and later the run goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_resume import result
from tiny_run import configuration, prepare

from thrifty.cli.main import main
from thrifty.run.checkpoint import checkpoints

PAGE = 4096

Resize = Callable[[int], None]
Disk = tuple[Path, Resize]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("full"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Resize]]:
    """A small file system of its own, and what sets its size in pages."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if not sys.platform.startswith("linux") or shutil.which("mount") is None or not mount("size=64m"):
        pytest.skip("mounting a file system needs Linux and its root")
    try:
        yield place, lambda pages: assert_true(mount("remount", f"size={pages * PAGE}"))
    finally:
        subprocess.run(["umount", str(place)], check=True)


def assert_true(value: bool) -> None:
    assert value


def pages(place: Path) -> int:
    """In use."""
    found = os.statvfs(place)
    return found.f_blocks - found.f_bfree


def full_at_each(folder: Path, disk: Disk, capsys: Capture, **changes: Any) -> set[str]:
    """Train on a disk of each size, from one page on; go on when there is room. Returns what could not be written."""
    place, resize = disk
    run = folder / "run.json"  # JSON is YAML
    run.write_text(json.dumps(configuration(folder, output_dir=str(place / "out"), max_steps=8, **changes)))
    assert main(["train", str(run)]) == 0
    expected, most = outcome(place / "out"), pages(place)
    said = set[str]()
    for size in range(1, most + 1, 1 + most // 20):
        shutil.rmtree(place / "out")
        resize(size)
        capsys.readouterr()
        code = main(["train", str(run)])
        error = capsys.readouterr().err.strip()
        if code != 0:
            assert code == 2, error
            found = re.fullmatch(r"thrifty: could not write (\S+): No space left on device; .*free.*", error)
            assert found, error  # one line
            said.add(Path(found[1]).name)
        assert not [path for path in place.rglob("*") if ".partial" in path.name]
        resize(2 * most)
        assert main(["train", str(run), "resume_from_checkpoint=auto"]) == 0
        assert outcome(place / "out") == expected
    return said


def outcome(output: Path) -> dict[str, Any]:
    if checkpoints(output):
        return result(output)
    return {file.name: file.read_bytes() for file in [*output.rglob("*.safetensors"), output / "answers.jsonl"]}


def test_full_while_checkpoints_are_written(folder: Path, disk: Disk, capsys: Capture) -> None:
    assert full_at_each(folder, disk, capsys, save_steps=4) >= {"out", "checkpoint-4", "checkpoint-8"}


def test_full_while_the_result_is_written(folder: Path, disk: Disk, capsys: Capture) -> None:
    changes = {"save_strategy": "no", "logging_steps": 1, "eval": {"loss": True, "exact_match": 9}}
    assert full_at_each(folder, disk, capsys, **changes) >= {"out", "delta", "metrics.jsonl"}
