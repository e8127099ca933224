"""What a run shows: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import yaml
from tiny_run import configuration, prepare

_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_WORDS = ("loss ", " tokens/s", "iB", " left")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare(tmp_path_factory.mktemp("display"))
    (folder / "run.yaml").write_text(yaml.safe_dump(configuration(folder)), encoding="utf-8")
    return folder


def train(ready: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "thrifty", "train", str(ready / "run.yaml"), "logging_steps=2", *words]


def through_a_terminal(command: list[str], *, columns: int) -> tuple[int, str]:
    """Exit code and all that a terminal of `columns` columns was sent."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        sent = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            sent += piece
        os.close(ours)
        return process.wait(timeout=60), sent.decode()


@pytest.mark.parametrize("columns", [80, 140])
def test_one_live_line_on_a_terminal(ready: Path, columns: int) -> None:
    code, sent = through_a_terminal(
        train(ready, "max_steps=12", "eval_steps=4", f"output_dir={ready}/{columns}"), columns=columns
    )
    assert code == 0, sent
    assert sent.rindex("\x1b[?25h") > sent.rindex("\x1b[?25l"), "the cursor is shown again"
    live = [_CODES.sub("", line).strip() for line in re.split(r"[\r\n]", sent)]
    live = [line for line in live if re.match(r"step +\d+/12 ", line)]
    assert re.match(r"step +12/12 ", live[-1])
    for word in _WORDS:
        assert any(word in line for line in live), word
    assert all(len(line) <= columns for line in live)
    assert not any(re.search(r"\S", line) and "eval loss" in line and not line.startswith("step") for line in live)
    text = _CODES.sub("", sent)
    assert text.count("peak memory") == 1, "the result comes after the live line, on lines of its own"


def test_plain_lines_elsewhere(ready: Path) -> None:
    done = subprocess.run(
        train(ready, "max_steps=6", f"output_dir={ready}/plain"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    steps = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["1/6", "2/6", "4/6", "6/6"]
    for line in steps:
        assert all(word in line for word in _WORDS), line
