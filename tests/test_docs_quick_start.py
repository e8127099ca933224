"""The quick start as a whole, as somebody types it: the real command line in a terminal, on a tiny model."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from docs_pages import ROOT, blocks, embed

PAGE = ROOT / "docs" / "quick-start.md"
SECONDS = 900  # for one command, on a machine with other work


def typed(line: str, *, folder: Path, environment: dict[str, str]) -> str:
    """What a shell in a terminal shows for `line`. A chat is asked one question and left with Ctrl-D."""
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        ["bash", "-c", line],
        cwd=folder,
        env=environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    shown, asked, end = b"", 0, time.monotonic() + SECONDS
    while time.monotonic() < end:
        if select.select([main], [], [], 0.2)[0]:
            try:
                shown += os.read(main, 65536)
            except OSError:  # the last writer has closed the terminal
                break
        prompts = len(re.findall(rb"^> ", shown, re.MULTILINE))
        if prompts > asked:
            os.write(main, b"Play some jazz ->\n" if asked == 0 else b"\x04")
            asked = prompts
    process.kill() if process.poll() is None and time.monotonic() >= end else process.wait()
    os.close(main)
    text = shown.decode()
    assert process.wait() == 0, f"$ {line}\n{text}"
    return text


@pytest.mark.timeout(8 * SECONDS)
def test_the_quick_start_in_a_terminal(tmp_path: Path) -> None:
    cache, programs, folder = (tmp_path / name for name in ("cache", "bin", "work"))
    for place in (programs, folder):
        place.mkdir()
    embed(cache)
    program = programs / "thrifty"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m thrifty "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "THRIFTY_CACHE": str(cache),
        "TERM": "xterm",
    }
    shown: dict[str, str] = {}
    for block in blocks(PAGE):
        if block.title:
            (folder / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "bash":
            for line in block.text.splitlines():
                # Installing is what CI does before; tests/test_demo.py runs the demonstration.
                if not line.startswith(("pip ", "make ")):
                    shown[line.split()[1]] = typed(line, folder=folder, environment=environment)
        else:
            (folder / "block.py").write_text(block.text, encoding="utf-8")
            typed(f'"{sys.executable}" block.py', folder=folder, environment=environment)
    assert list(shown) == ["env", "init", "train", "chat", "eval", "delta", "export"]
    assert "thrifty train run.yaml" in shown["init"]
    assert "20/20" in shown["train"]
    assert "Ctrl-D leaves." in shown["chat"]
    assert "exact_match: " in shown["eval"]
    assert "numbers trained" in shown["delta"]
    assert (folder / "my-model" / "model.safetensors").is_file()
    assert not any("Traceback" in text for text in shown.values())
