"""`thrifty completion`: bash completes verbs, options, methods, files and keys with what it prints."""

from __future__ import annotations

import shutil
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


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
def test_fish_completes(tmp_path: Path) -> None:
    (tmp_path / "thrifty.fish").write_text(completion_script("fish"), encoding="utf-8")
    (tmp_path / "run.yaml").touch()
    lines = ("thrifty val", "thrifty delta comp", "thrifty methods show random_b", "thrifty train run.yaml max_st")
    asked = "; ".join(["source thrifty.fish", *(f'complete -C "{line}"' for line in (*lines, "thrifty train run"))])
    done = subprocess.run(["fish", "-c", asked], capture_output=True, text=True, cwd=tmp_path, check=False)
    found = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert found == ["validate", "compress", "random_blocks", "max_steps=", "run_name=", "run.yaml"], done.stderr


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_zsh_takes_the_script(tmp_path: Path) -> None:
    (tmp_path / "thrifty.zsh").write_text(completion_script("zsh"), encoding="utf-8")
    load = 'autoload -Uz compinit; compinit -u -D; eval "$(cat thrifty.zsh)"'
    asked = f"{load}; print $_comps[thrifty]; whence -w $_comps[thrifty]"
    done = subprocess.run(["zsh", "-f", "-c", asked], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout == "_shtab_thrifty\n_shtab_thrifty: function\n", done.stderr
    assert not done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_verbs_and_keys(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    for word in ("validate", "harness", "random_blocks", "max_steps=", "eval.exact_match="):
        assert word in out


def test_without_shtab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == "thrifty: completion needs shtab: pip install 'thrifty[completion]'\n"
    assert main(["completion", "tcsh"]) == 2
