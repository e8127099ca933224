"""The run files of SMT's own experiments: each loads, is checked and estimated, from its model's shape alone."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny_tokenizer import character_tokenizer

from thrifty.core.method import parse_method
from thrifty.predict.cost import on, traced
from thrifty.predict.hardware import find_hardware
from thrifty.predict.placing import attach
from thrifty.predict.skeleton import build
from thrifty.run.checks import machine
from thrifty.run.config import load_config
from thrifty.run.validate import validate

ROOT = Path(__file__).parent.parent
PAPER = ROOT / "configs" / "paper"
README = (PAPER / "README.md").read_text(encoding="utf-8")
FILES = ("smt", "lora", "dora", "full")
MODELS = ("llama-7b", "llama-13b", "llama-2-7b", "llama-3-8b")
# per cent of the numbers, as LLM-Adapters' and DoRA's authors give them (cut after two places)
PUBLISHED = {"lora": (0.83, 0.67, 0.83, 0.70), "dora": (0.84, 0.68, 0.84, 0.71)}
LINES = re.findall(r"^thrifty train (configs/paper/.*)$", README, re.MULTILINE)


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale_estimate", ROOT / "results" / "scale" / "estimate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCALE = _script()
COMMANDS = SCALE.commands()
SHORT = [c for c in COMMANDS if c.split()[1].endswith("/llama-7b")]
KEPT: dict[str, Any] = json.loads(SCALE.KEPT.read_text(encoding="utf-8"))


def named(command: str) -> str:
    """For a test's id: `smt llama-7b`."""
    return f"{Path(command.split()[0]).stem} {Path(command.split()[1]).name} {'large' if '.91%' in command else ''}"


def test_every_file_and_shape_is_in_the_readme() -> None:
    assert {f"{name}.yaml" for name in FILES} == {file.name for file in PAPER.glob("*.yaml")}
    assert set(re.findall(r"^\| `(\w+\.yaml)` \|", README, re.MULTILINE)) == {f"{name}.yaml" for name in FILES}
    folders = {Path(shape).name for shape in SCALE.shapes().values()}
    assert folders == {folder.name for folder in (PAPER / "shapes").iterdir()} == {*MODELS, "mixtral-8x7b"}


def test_every_combination_has_a_command_and_a_folder_of_its_own() -> None:
    found = {(Path(c.split()[0]).stem, Path(c.split()[1]).name) for c in COMMANDS}
    assert found == set(product(FILES, MODELS))
    outputs = [word for line in LINES for word in shlex.split(line) if word.startswith("output_dir=")]
    assert len(set(outputs)) == len(LINES) == len(COMMANDS)


@pytest.mark.parametrize("data", ["commonsense_170k.json", "math_10k.json"])
@pytest.mark.parametrize("line", LINES)
def test_every_command_of_the_readme_is_a_run(line: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file, *settings = shlex.split(line)
    config = load_config(file, [*settings, *([] if data.startswith("common") else [f"data.train={data}"])])
    assert config.model in SCALE.shapes()
    assert [source.path for source in config.data.train] == [data]
    assert parse_method(config.method).name == {"smt": "smt", "full": "full"}.get(Path(file).stem, "peft")
    assert config.training["num_train_epochs"] == 3
    assert (config.budget is not None) == ("smt.yaml" in file)
    assert load_config(config.to_dict()) == config


@pytest.mark.parametrize("command", COMMANDS, ids=named)
def test_what_is_trained_meets_the_budget_or_what_was_published(command: str) -> None:
    job = SCALE.job(command)
    model = build(job)
    total = sum(p.numel() for p in model.parameters())
    attached, plan = attach(model, job.method, job.budget)
    trained = sum(p.numel() for p in attached.parameters() if p.requires_grad)
    name, model_name = Path(command.split()[0]).stem, Path(command.split()[1]).name
    if name == "smt":
        assert plan is not None
        assert job.budget is not None
        assert 0.98 * job.budget.of(total) < trained <= job.budget.of(total)
        assert {module.rsplit(".", 2)[-2] for module in plan} <= {"q_proj", "k_proj", "v_proj"}
    elif name == "full":
        assert trained == total
    else:
        assert int(1e4 * trained / total) / 100 == PUBLISHED[name][MODELS.index(model_name)]
    kept = KEPT[command]["devices"]["rtx-4090"]["estimate"]
    assert (kept["parameters"], kept["trained"]) == (total, trained)


@pytest.mark.parametrize("command", SHORT, ids=named)
def test_validate_finds_nothing_but_what_this_machine_lacks(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda device: 0)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: SimpleNamespace(free=10**15))
    character_tokenizer(chat_template=None).save_pretrained(tmp_path / "tokenizer")
    row = {"instruction": "Is it so?", "input": "", "output": "the correct answer is true", "answer": "true"}
    (tmp_path / "rows.json").write_text(json.dumps([row | {"instruction": f"Is it {i}?"} for i in range(40)]))
    monkeypatch.chdir(ROOT)
    file, *settings = command.split()
    more = [f"tokenizer={tmp_path / 'tokenizer'}", f"data.train={tmp_path / 'rows.json'}", f"output_dir={tmp_path}/out"]
    report = validate(file, [*settings, *more])
    weights, memory = report.problems
    assert weights.endswith("has no *.safetensors")
    assert memory.startswith("memory: weights ")


def test_the_page_holds_what_was_estimated() -> None:
    assert list(KEPT) == [*COMMANDS, *SCALE.MORE]
    assert SCALE.page(KEPT) in SCALE.DOC.read_text(encoding="utf-8")


def agrees(command: str) -> None:
    found = traced(SCALE.job(command))
    for name, kept in KEPT[command]["devices"].items():
        estimate = on(found, find_hardware(name))
        assert estimate.peak_bytes == pytest.approx(kept["estimate"]["peak_bytes"], rel=0.01)
        assert estimate.step_seconds == pytest.approx(kept["estimate"]["step_seconds"], rel=0.02)


@pytest.mark.parametrize("command", SHORT, ids=named)
def test_the_estimates_are_those_of_the_page(command: str) -> None:
    agrees(command)


@pytest.mark.timed
@pytest.mark.parametrize("command", [c for c in (*COMMANDS, *SCALE.MORE) if c not in SHORT], ids=named)
def test_the_other_estimates_too(command: str) -> None:
    agrees(command)
