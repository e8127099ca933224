"""`thrifty eval --harness`: lm_eval's own figures for a base model and for base plus delta."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_run import configuration, prepare
from transformers import AutoModelForCausalLM, AutoTokenizer

import thrifty.run.harness as harness
from thrifty.cli.main import main
from thrifty.core.errors import ThriftyError
from thrifty.delta import Delta
from thrifty.run.folder import locate
from thrifty.run.train import train

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{target}"
{choices}
target_delimiter: ""
metric_list:
  - {{metric: {metric}, aggregation: {aggregation}, higher_is_better: true}}
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, the run `out`, and two tasks for lm_eval in `tasks`."""
    folder = prepare(tmp_path_factory.mktemp("harness"))
    train(configuration(folder, max_steps=8, budget=0.3))
    tasks = folder / "tasks"
    tasks.mkdir()
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [{**row, "choices": [row["completion"], "abc"], "label": 0} for row in rows]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = {"rows": folder / "asked.jsonl"}
    likelihood = {"kind": "loglikelihood", "target": "{{completion}}", "metric": "perplexity", "choices": ""}
    choice = {"kind": "multiple_choice", "target": "label", "metric": "acc", "choices": "doc_to_choice: choices"}
    for name, filled, mean in (("tiny_sums", likelihood, "perplexity"), ("tiny_choice", choice, "mean")):
        text = TASK.format(name=name, aggregation=mean, **asked, **filled)
        (tasks / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def likelihoods(model: torch.nn.Module, folder: Path, answer: str | None = None) -> list[float]:
    """Of each row's answer (or of `answer`), summed over its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    found = []
    for line in (folder / "asked.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
        ids = prompt + tokenizer(answer or row["completion"], add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(sum(logits[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))))
    return found


def expected(model: torch.nn.Module, folder: Path) -> dict[str, float]:
    right, wrong = likelihoods(model, folder), likelihoods(model, folder, "abc")
    return {
        "tiny_sums/perplexity": math.exp(-sum(right) / len(right)),
        "tiny_choice/acc": sum(r > w for r, w in zip(right, wrong)) / len(right),
    }


def figures(said: str) -> dict[str, float]:
    return {name: float(value) for name, value in (line.split(": ") for line in said.splitlines())}


def test_the_figures_are_those_of_base_plus_delta(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    untrained = expected(base, run)
    trained = expected(Delta.load(run / "out/delta").apply(base), run)
    assert trained["tiny_sums/perplexity"] < untrained["tiny_sums/perplexity"]
    asked = ["--harness", "tiny_sums,tiny_choice", "--harness-path", str(run / "tasks")]
    capsys.readouterr()
    assert main(["eval", str(run / "out"), *asked, "eval.batch_size=3"]) == 0
    assert figures(capsys.readouterr().out) == pytest.approx(trained, rel=1e-4)


def test_a_task_that_lm_eval_does_not_know(run: Path) -> None:
    with pytest.raises(ThriftyError, match="did you mean 'tiny_sums'"):
        harness.run_harness(locate(str(run / "out")), tasks=["tiny_sumz"], folder=str(run / "tasks"))


MISTAKES = {
    ("--harness", "tiny_sums", "--harness-path", "none"): "there is no folder 'none'",
    ("--harness-path", "tasks"): "name those to measure with --harness",
    ("--harness", "tiny_sums", "eval.exact_match=2"): "eval.exact_match does not go with --harness",
    ("--harness", ","): "--harness names no task",
}


@pytest.mark.parametrize(("words", "message"), MISTAKES.items(), ids=[" ".join(words) for words in MISTAKES])
def test_mistakes(
    words: tuple[str, ...],
    message: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(run)
    assert main(["eval", "out", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_without_lm_eval(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert main(["eval", str(run / "out"), "--harness", "tiny_sums"]) == 2
    assert "pip install 'thrifty[harness]'" in capsys.readouterr().err
