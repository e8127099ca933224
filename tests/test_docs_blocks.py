"""Every command and code block of the documentation does what it says, on a tiny model."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import shutil
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from docs_pages import (
    ROOT,
    Block,
    blocks,
    embed,
    furnish,
    furnish_deltas,
    furnish_readme,
    shorter,
    tiny_batches,
    tiny_model,
)
from tiny_tokenizer import character_tokenizer

import thrifty
from thrifty.cli.main import main, parser
from thrifty.run import aliases
from thrifty.run.config import load_config
from thrifty.study.config import load_study

# The quick start runs in tests/test_docs_quick_start.py.
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").rglob("*.md")} - {ROOT / "docs" / "quick-start.md"})
WITH_BLOCKS = [page for page in PAGES if blocks(page)]
DONE: Counter[str] = Counter()
NOT_RUN: list[str] = []
_PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    embed(folder)
    return folder


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("THRIFTY_CACHE", str(cache))
    commands = tmp_path / "commands"
    # What a page's commands leave is there for its Python; in the README both write to the same place.
    python = tmp_path / "python" if page.name == "README.md" else commands
    for folder in (commands, python):
        folder.mkdir(exist_ok=True)
        furnish(folder)
    monkeypatch.chdir(commands)
    if page.name == "README.md":
        furnish_readme(python)
    elif page.name == "deltas.md":
        furnish_deltas(commands, lambda line: command(line, monkeypatch))
    elif page.name == "estimate.md":
        values = "model: smollm2-135m\ndata: {train: requests.jsonl}\nbudget: 2%\nmax_steps: 3\n"
        (commands / "run.yaml").write_text(values, encoding="utf-8")
    elif page.name == "scale.md":
        shutil.copytree(ROOT / "configs", commands / "configs")
    for block in blocks(page):
        monkeypatch.chdir(python if block.language == "python" else commands)
        if block.not_run:
            NOT_RUN.append(f"{block.place}: {block.not_run}")
            continue
        try:
            run(block, monkeypatch)
        except BaseException as error:
            error.add_note(f"in the {block.language} block {block.place}")
            raise


def run(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.language == "bash":
        for line in block.text.replace("\\\n", "").splitlines():
            command(line, monkeypatch)
    elif block.language in ("yaml", "python"):
        {"yaml": read_yaml, "python": run_python}[block.language](block)
        DONE[block.language] += 1
    elif block.language == "json":
        assert block.title, f"{block.place}: which file is this?"
        Path(block.title).write_text(block.text, encoding="utf-8")
    else:
        assert block.language == "text", f"{block.place}: what is to be done with {block.language}?"


def command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a line of thrifty; of another program, look whether what it names is there."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    if not words:
        return
    program = words[0]
    if program == "thrifty":
        words = shorter(words[1:]) if words[1] == "train" else words[1:]
        monkeypatch.setattr("sys.stdin", io.StringIO("Play some jazz\n"))
        assert main(words) == 0, line
    elif program == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), line
    elif words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[([\w,]+)\]", line)
        assert extras, line
        assert set(extras[0].split(",")) <= set(_PYPROJECT["project"]["optional-dependencies"]), line
    elif words[:3] == ["python", "-m", "benchmarks"]:
        assert f'"{words[3]}"' in (ROOT / "benchmarks" / "__main__.py").read_text(encoding="utf-8"), line
    else:
        assert program in ("bash", "python"), line
        assert (ROOT / words[1]).is_file(), line
    DONE["commands of thrifty" if program == "thrifty" else "commands of others, looked up"] += 1


def read_yaml(block: Block) -> None:
    """A study, a run file, or some keys of one."""
    file = Path(block.title or "block.yaml")
    file.write_text(block.text, encoding="utf-8")
    values = yaml.safe_load(block.text)
    if "tasks" in values:
        load_study(file)
    else:
        missing = {"model": "smollm2-135m", "data": {"train": "requests.jsonl"}}
        load_config(file, {key: value for key, value in missing.items() if key not in values})


def run_python(block: Block) -> None:
    model, batches = tiny_model(), tiny_batches()
    given: dict[str, Any] = {
        "torch": torch,
        "thrifty": thrifty,
        "model": model,
        "batches": batches,
        "batch": {name: value for name, value in batches[0].items() if name != "labels"},
        "base": tiny_model(),
        "tuned": tiny_model(1),
        "newer_model": tiny_model(1),
        "tokenizer": character_tokenizer(),
    }
    exec(compile(block.text, block.place, "exec"), given)


def made_pages() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pages: dict[str, str] = module.pages()
    return pages


def test_the_made_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pages = made_pages()
    for name, text in pages.items():
        for block in blocks(Path(name), text):
            if block.language == "yaml":
                read_yaml(block)
                DONE["yaml of the methods' pages"] += 1
        assert not re.search(r"<(class|function|dataclasses|object)", text), name
    assert "`eval.exact_match` | `int or bool` | `0` |" in pages["reference/run-file.md"]
    assert "`per_device_train_batch_size`" in pages["reference/training-arguments.md"]
    assert "`lr`" in pages["reference/other-names.md"]


def tables(page: Path) -> list[list[str]]:
    """The rows of a page's tables, cells stripped."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in rows if len(row) == 2 and set(row[0]) != {"-"}]


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "coming-from").glob("*.md")), ids=lambda page: page.stem)
def test_the_tables_of_other_tools(page: Path) -> None:
    """Our column holds settings that load and commands that exist, and agrees with what errors say."""
    for theirs, ours in tables(page):
        for span in re.findall(r"`([^`]+)`", ours):
            if span.startswith("thrifty "):
                check_words(shlex.split(span)[1:])
            elif re.match(r"(model|data|method|objective|\w+): \S", span) and not span.startswith(
                ("split:", "columns:")
            ):
                values = yaml.safe_load(span.replace("...", "x"))
                if "peft_type" not in values:
                    data = {"train": "t", "eval": "e"} | values.pop("data", {})
                    load_config({"model": "m", "data": data} | values)
        for key in re.findall(r"`-{0,2}(\w+)[`:]", theirs):
            if called := re.fullmatch(r"called '([\w.]+)' here", aliases.OTHER_NAMES.get(key, "")):
                named = called[1].split(".")[-1]
                assert named in ours or called[1].split(".")[0] in ours, f"{key}: {ours}, errors say {called[1]}"


class _Missing(Exception):
    pass


def _refuse(command: Any, message: str) -> None:
    raise _Missing if "required" in message else AssertionError(message)


def check_words(words: list[str]) -> None:
    """Only arguments may be missing: a table names the verb."""
    with contextlib.suppress(_Missing), pytest.MonkeyPatch.context() as patch:
        patch.setattr("thrifty.cli.main._Parser.error", _refuse)
        parser().parse_known_args(words)


def test_what_was_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Last, for whoever reads the log."""
    assert all(reason for reason in NOT_RUN)
    with capsys.disabled():
        print("\n" + "\n".join([*(f"{count} {what}" for what, count in sorted(DONE.items())), *NOT_RUN]))
