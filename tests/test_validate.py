"""`thrifty validate`: what is wrong is told all at once, each with its fix; what is right is told to be right."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny_run import configuration, prepare, write_rows
from transformers import AutoTokenizer

from thrifty.cli.main import main
from thrifty.run.checks import machine
from thrifty.run.checks.report import Report
from thrifty.run.validate import validate


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data and `run.yaml`, of which a run could start."""
    folder = prepare(tmp_path_factory.mktemp("ready"))
    (folder / "run.yaml").write_text(yaml.safe_dump(configuration(folder)), encoding="utf-8")
    return folder


def look(ready: Path, *overrides: str, terminal: bool = False, **options: Any) -> tuple[Report, str]:
    """What is found, and what is printed."""
    printed = io.StringIO()
    console = Console(file=printed, force_terminal=terminal, color_system="standard" if terminal else None)
    report = validate(ready / "run.yaml", overrides, console=console, **options)
    for text in (*report.problems, *report.warnings):
        assert "\n" not in text
        assert text in printed.getvalue()
    return report, printed.getvalue()


def has(found: list[str], *parts: str) -> bool:
    return any(all(part in text for part in parts) for text in found)


def rows_in(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def test_what_is_right_is_told_and_nothing_is_written(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(str(path) for path in ready.rglob("*"))
    assert main(["validate", str(ready / "run.yaml"), "max_steps=9"]) == 0
    out = capsys.readouterr().out
    for part in (
        "LlamaForCausalLM, 34,840 numbers, float32",
        "train.jsonl: 22 rows: prompt + completion",
        "38% of them trained",
        "train.jsonl:3 (13 tokens)",
        "22 rows written, encoded and decoded",
        "9 steps of 4 rows: each of the 22 rows is seen 1.6 times",
        "smt: chooses in 14 matrices (q_proj 2, k_proj 2,",
        "up to 27 blocks of 8 x 8",
        "at most 1,742 of 34,840 numbers",
        "free on cpu",
        f"no problems; start with `thrifty train {ready}/run.yaml max_steps=9`",
    ):
        assert part in out
    assert "problem:" not in out
    assert "warning:" not in out
    assert sorted(str(path) for path in ready.rglob("*")) == before


def test_all_planted_problems_are_listed_at_once(
    ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [{"prompt": f"{i}+1=", "completion": "" if i < 7 else str(i)} for i in range(9)]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text("{}")
    file = tmp_path / "bad.yaml"
    file.write_text(
        f"""\
model: {ready}/model
data:
  train: {rows_in(tmp_path / "broken.jsonl", broken)}
  eval: {ready}/evla.jsonl
lr: 3
method: {{smt: {{target_modules: [q_prj]}}}}
eval: {{forgetting: none.txt, batch_size: 0}}
output_dir: {tmp_path}/out
report_to: wandb
""",
        encoding="utf-8",
    )
    assert main(["validate", str(file), "max_steps=many", "data..train=x"]) == 2
    out = capsys.readouterr().out
    found = [line.strip() for line in out.splitlines() if line.strip().startswith("problem: ")]
    for parts in (
        (f"{file}:5: 'lr' is called 'learning_rate' here",),
        (f"{file}:7: eval.batch_size must be 1 or more",),
        ("command line: max_steps must be an integer",),
        ("command line: 'data..train' is not a key",),
        ("eval.forgetting: there is no file 'none.txt'",),
        ("report_to: unknown tracker 'wandb'",),
        (f"{tmp_path}/broken.jsonl:1: field 'completion' is empty",),
        (f"{tmp_path}/broken.jsonl:5: field 'completion' is empty",),
        (f"{tmp_path}/broken.jsonl: 7 of 9 rows are broken",),
        (f"{ready}/evla.jsonl: no such file; did you mean {ready}/eval.jsonl?",),
        ("method: target_modules: unknown module 'q_prj'; did you mean 'q_proj'?",),
        ("output_dir:", "holds a finished run"),
    ):
        assert has(found, *parts), parts
    assert f"{len(found)} problems" in out
    assert len(found) == len(set(found))
    assert not has(found, "broken.jsonl:6"), "the first five are named"


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["budget=9"], ("method: budget", "buys no block", "raise budget to at least")),
        (["method.peft.r=4", "budget=1%"], ("budget: the PEFT configuration trains 4,928", "lower its rank")),
        (["method.smt.target_modules=[nothing]"], ("target_modules: unknown module 'nothing'",)),
        (["model=ready/modle"], ("model 'ready/modle': no",)),
        (["max_length=3"], ("data.train: all labels", "max_length=3 cuts every answer off", "raise it")),
        (["eval.choice=true", "eval.choices=[a,b]"], ("is none of its options", "'a', 'b'")),
        (["early_stopping_patience=3"], ("early_stopping_patience needs evaluations", "eval_steps=50")),
        (["resume_from_checkpoint=nowhere"], ("resume_from_checkpoint: 'nowhere' is no complete checkpoint",)),
        (["output_dir=run.yaml/x"], ("output_dir:", "is a file")),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)
def test_one_problem_is_told_alone(
    ready: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], parts: tuple[str, ...]
) -> None:
    monkeypatch.chdir(ready)
    report, out = look(ready, *settings)
    assert has(report.problems, *parts), report.problems
    related = 2 if settings[0].startswith(("model=", "max_length=")) else 1  # the tokenizer too; data.eval too
    assert len(report.problems) == related
    assert "no problems" not in out


def test_parts_that_meet(ready: Path) -> None:
    blocks = "{select: {blocks: {block_size: 8, target_modules: [q_proj]}}}"
    report, out = look(ready, f"method=[{{select: norms}}, {blocks}]")
    assert not report.problems
    assert not report.warnings
    assert "part 1: 5 tensors (input_layernorm 2, post_attention_layernorm 2, norm 1), 200 numbers" in out
    report, _ = look(ready, f"method=[{{select: {{tensors: {{layers: 0}}}}}}, {blocks}]", "budget=null")
    assert has(report.warnings, "part 1 and part 2 may both choose model.layers.0.self_attn.q_proj.weight")
    report, _ = look(ready, "method=[{select: norms}, {select: {tensors: {layers: 0}}}]", "budget=null")
    assert has(report.problems, "part 1 and part 2 both train model.layers.0.input_layernorm.weight")
    report, _ = look(ready, "method.peft.init_lora_weights=pissa", "budget=null")
    assert has(report.warnings, "an init_* option of PEFT that changes base weights is refused")


def test_data_are_read_where_no_model_can_be(ready: Path, tmp_path: Path) -> None:
    lines = (ready / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "twice.jsonl").write_text("\n".join([*lines, lines[0], "{}"]), encoding="utf-8")
    report, _ = look(ready, "model=null", f"data.train={tmp_path}/twice.jsonl", "data.eval=none.jsonl")
    for parts in (
        ("model must be a text or a mapping",),
        ("twice.jsonl:24: the row has nothing",),
        ("none.jsonl: no such file",),
    ):
        assert has(report.problems, *parts), parts
    assert len(report.problems) == 3
    assert has(report.warnings, "1 of 23 rows repeat another one")


def test_what_is_odd_is_a_warning(ready: Path, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "twice.jsonl", rows=10)
    lines = train.read_text(encoding="utf-8").splitlines()
    train.write_text("\n".join([*lines, lines[3], lines[3]]), encoding="utf-8")
    held_out = tmp_path / "held.jsonl"
    held_out.write_text("\n".join([lines[3].replace("=", "=1"), lines[5]]), encoding="utf-8")
    overrides = [f"data.train={train}", f"data.eval={held_out}", "max_length=10", "max_steps=200"]
    report, out = look(ready, *overrides)
    assert report.is_clean
    assert has(report.warnings, "data.train: 2 of 12 rows repeat another one, first", "twice.jsonl:11", "twice.jsonl:4")
    assert has(report.warnings, "data.eval: 1 of 2 rows are in data.train too", "held.jsonl:2", "twice.jsonl:6")
    assert has(report.warnings, "are cut at max_length 10: max_length=", "would keep 99 % of them whole")
    assert has(report.warnings, "each of the 12 rows would be seen 67 times", "max_steps=9")
    assert out.count("warning: ") == len(report.warnings)
    weighed, _ = look(ready, f"data.train=[{{path: {ready}/train.jsonl, weight: 3}}]")
    assert not weighed.warnings, "a row that a weight repeats is no duplicate"


def test_rows_without_a_whole_answer(ready: Path, tmp_path: Path) -> None:
    train = rows_in(tmp_path / "long.jsonl", [{"prompt": "1" * n, "completion": "2"} for n in (5, 60)])
    report, _ = look(ready, f"data.train={train}", "data.eval=null")
    assert has(report.warnings, "of 1 rows nothing is trained, first", "long.jsonl:2", "max_length 48")


def with_template(ready: Path, folder: Path, template: str) -> str:
    shutil.copytree(ready / "model", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_tokenizer_and_template(ready: Path, tmp_path: Path) -> None:
    chat = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "1234", strict=True)]
    train = rows_in(tmp_path / "chat.jsonl", [{"messages": chat}, {"prompt": "Ab", "completion": "c"}])
    plain = "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '') }}{% endfor %}"
    plain = with_template(ready, tmp_path / "plain", plain)
    report, out = look(ready, f"tokenizer={plain}", f"data.train={train}", "data.eval=null")
    assert has(report.warnings, "chat.jsonl:2: the tokenizer does not know 'A', and writes <unk>", "1 of 2 rows")
    assert "1 messages; 1 prompt + completion" in out
    endless = with_template(
        ready, tmp_path / "endless", "{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}"
    )
    report, _ = look(ready, f"tokenizer={endless}", f"data.train={train}", "data.eval=null")
    assert report.is_clean
    assert has(report.warnings, "chat.jsonl:1: an answer ends without a token that ends its turn")
    refusing = with_template(ready, tmp_path / "refusing", "{{ raise_exception('one turn only') }}")
    report, out = look(ready, f"tokenizer={refusing}", f"data.train={train}", "data.eval=null")
    assert has(report.problems, "chat.jsonl:1: the chat template refuses the conversation: one turn only")
    assert has(report.warnings, "does not know 'A'"), "the rows that can be written are looked at"


def test_samples_show_what_is_trained(ready: Path) -> None:
    first = json.loads((ready / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    _, plain = look(ready)
    assert f"[[{' '.join(first['completion'])} <eos>]]" in plain
    assert "\x1b[" not in plain
    _, coloured = look(ready, terminal=True)
    assert f"\x1b[32m{' '.join(first['completion'])} <eos>\x1b[0m" in coloured
    assert "[[" not in coloured


def test_memory_and_disk(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda device: 100_000)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(1, 1, 1000))
    report, _ = look(ready)
    assert has(report.problems, "memory: weights 136.1 KiB", "do not fit into the 97.7 KiB", "dtype=bfloat16 halves")
    assert has(report.problems, "output_dir: about", "for up to 3 checkpoints", "free space")
    assert len(report.problems) == 2


def test_missing_packages(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thrifty.run.objectives.find_spec", lambda name: None)
    monkeypatch.setattr("thrifty.run.arguments.find_spec", lambda name: None)
    report, _ = look(ready, "report_to=trackio")
    assert report.problems == ["report_to: trackio is not installed: pip install 'thrifty[report]', or report_to=none"]
    report, _ = look(ready, "optim=galore_adamw")
    assert report.problems == ["optim: galore_adamw needs galore-torch: pip install galore-torch, or leave optim out"]
    report, _ = look(ready, "objective=dpo")
    assert has(report.problems, "objective dpo needs TRL: pip install 'thrifty[trl]'")


@pytest.mark.parametrize("method", ["smt", "peft", "lisa"])
def test_a_step_is_taken_and_nothing_kept(ready: Path, method: str) -> None:
    options = {"smt": ["add_tokens=['<tool>']"], "peft": ["budget=null"], "lisa": ["budget=null", "bf16=true"]}[method]
    before = sorted(str(path) for path in ready.rglob("*"))
    report, out = look(ready, f"method={method}", "eval_steps=5", *options, step=True)
    assert not report.problems
    for part in ("one step of the longest rows (up to 13 tokens): ", "one evaluation batch: ", "peak memory: "):
        assert part in out
    assert ("choosing what to train: " in out) == (method == "smt")
    assert sorted(str(path) for path in ready.rglob("*")) == before
    report, out = look(ready, "budget=9", step=True)
    assert "not tried: mend what is listed first" in out


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["prompt", "completion", "messages", "text", "instruction", "output", "tools", "choices"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(FIELDS, JSON, max_size=4), min_size=1, max_size=4))
def test_no_row_ends_it(ready: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    report, _ = look(ready, f"data.train={rows_in(tmp_path / 'any.jsonl', rows)}", "data.eval=null")
    assert report.problems or report.facts
