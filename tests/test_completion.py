"""`thrifty completion`: bash completes verbs, options, methods, files and keys with what it prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import thrifty
from thrifty.cli.completion import SHELLS, completion_script
from thrifty.cli.main import main


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "thrifty.bash"
    file.write_text(completion_script("bash"), encoding="utf-8")
    return file


def completed(bash: Path, line: str) -> list[str]:
    """What bash offers for the last word of `line` (words are separated by one space)."""
    asked = f"""
source {bash} || exit 3
complete -p thrifty >/dev/null || exit 4
COMP_WORDS=({line} {"''" if line.endswith(" ") else ""})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_thrifty_complete 2>/dev/null
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, cwd=bash.parent, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_bash_completes(bash: Path) -> None:
    (bash.parent / "run.yaml").touch()
    assert completed(bash, "thrifty val") == ["validate"]
    assert {"train", "delta", "completion"} <= set(completed(bash, "thrifty "))
    assert completed(bash, "thrifty delta comp") == ["compress"]
    assert "--harness" in completed(bash, "thrifty eval --")
    assert completed(bash, "thrifty export --dt") == ["--dtype"]
    assert set(completed(bash, "thrifty methods ")) == {"show", *thrifty.methods()}
    assert completed(bash, "thrifty methods show random_b") == ["random_blocks"]
    assert completed(bash, "thrifty train run") == ["run_name=", "run.yaml"]
    assert completed(bash, "thrifty validate run.yaml data.t") == ["data.train="]
    assert completed(bash, "thrifty train run.yaml max_st") == ["max_steps="]
    assert completed(bash, "thrifty completion ") == ["bash", "zsh", "fish"]


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_verbs_and_keys(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Only bash is there to run its script."""
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    for word in ("validate", "harness", "random_blocks", "max_steps=", "eval.exact_match="):
        assert word in out


def test_without_shtab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == "thrifty: completion needs shtab: pip install 'thrifty[completion]'\n"
    assert main(["completion", "tcsh"]) == 2
