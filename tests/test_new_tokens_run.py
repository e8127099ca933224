"""Runs with `add_tokens` by the command line: training, resuming, evaluating, exporting, talking, and mistakes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_new_tokens import TOKENS, checkpoint, weights
from test_resume import result
from tiny_run import configuration
from transformers import AutoModelForCausalLM, AutoTokenizer

from thrifty import Delta
from thrifty.cli.main import main
from thrifty.run.yaml_source import dump_yaml


def run_folder(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of rows with new tokens in prompts and answers."""
    lines = []
    for i in range(12):
        lines.append(json.dumps({"prompt": f"{i}+{i}<tool>", "completion": f"<tool>{2 * i}<end tool>"}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "eval.jsonl").write_text("\n".join(lines[:4]) + "\n", encoding="utf-8")
    settings = {"max_steps": 6, "lr_scheduler_type": "constant", "save_steps": 2, "add_tokens": TOKENS}
    settings |= {"eval": {"exact_match": 2, "before": True, "max_new_tokens": 4}}
    return configuration(folder, **(settings | changes))


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("gemma2", "bfloat16")])
def test_a_run_trains_resumes_evaluates_exports_and_chats(
    family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path / "model", family=family)
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(dump_yaml(run_folder(tmp_path, dtype=dtype, model="model")), encoding="utf-8")
    train = ["train", "run.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", "thrifty", *train, "output_dir=whole"],
        capture_output=True, text=True, encoding="utf-8", timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "new tokens: 2; the vocabulary has 99 rows, 2 of them new" in done.stdout
    assert "in no training row" not in done.stdout
    assert main([*train, "output_dir=other", "max_steps=1", "add_tokens=[<other>, <tool>]"]) == 0
    assert "2 of them new; in no training row: '<other>'" in capsys.readouterr().out
    assert main([*train, "output_dir=part", "max_steps=4"]) == 0
    assert main([*train, "output_dir=part", "resume_from_checkpoint=auto"]) == 0
    assert result(Path("part")) == result(Path("whole"))
    assert AutoTokenizer.from_pretrained("whole/tokenizer").convert_tokens_to_ids(TOKENS) == [97, 98]
    answers = [json.loads(line) for line in Path("whole/answers.jsonl").read_text().splitlines()]
    assert answers[0]["reference"] == "<tool>0<end tool>"

    loss = json.loads(Path("whole/summary.json").read_text())["evaluation"]["after"]["loss"]
    capsys.readouterr()
    assert main(["eval", "whole"]) == 0
    assert f"loss: {loss:.6g}\n" in capsys.readouterr().out
    assert main(["eval", "model", "--delta", "whole/delta", "data.eval=eval.jsonl", f"dtype={dtype}"]) == 0
    assert f"loss: {loss:.6g}\n" in capsys.readouterr().out
    assert main(["export", "whole", "--output", "exported"]) == 0
    exported = weights(AutoModelForCausalLM.from_pretrained("exported", dtype="auto"))
    plain = AutoModelForCausalLM.from_pretrained("model", dtype=getattr(torch, dtype))
    Delta.load("whole/delta").apply(plain)
    for name, values in weights(plain).items():
        assert torch.equal(values, exported[name]), name
    tokenizer = AutoTokenizer.from_pretrained("exported")
    assert tokenizer.decode(tokenizer("1<tool>2", add_special_tokens=False).input_ids) == "1<tool>2"
    monkeypatch.setattr(sys, "stdin", io.StringIO("1<tool>\n"))
    assert main(["chat", "whole"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_tokens": []}, "add_tokens must be a list of at least one token"),
        ({"add_tokens": ["<t>", "<t>"]}, "add_tokens: '<t>' is listed twice"),
        ({"add_tokens": ["<t>", 3]}, "add_tokens must be"),
        ({"add_tokens": "<t>"}, "add_tokens must be"),
        ({"add_tokens": ["<turn>"]}, "'<turn>' is in the tokenizer's vocabulary already"),
        ({"method": {"peft": {"peft_type": "LORA", "r": 2}}, "budget": None}, "beside a PEFT method"),
        ({"add_token": ["<t>"]}, "unknown key 'add_token'; did you mean 'add_tokens'"),
        ({"additional_special_tokens": ["<t>"]}, "called 'add_tokens' here"),
    ],
)
def test_a_run_file_with_a_mistake_answers_2(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(dump_yaml(run_folder(tmp_path, **changes)), encoding="utf-8")
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_resuming_with_other_tokens_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(dump_yaml(run_folder(tmp_path, max_steps=2)), encoding="utf-8")
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    again = ["train", str(tmp_path / "run.yaml"), "max_steps=4", "resume_from_checkpoint=auto"]
    assert main([*again, "add_tokens=['<tool>']"]) == 2
    assert "add_tokens was ['<tool>', '<end tool>']" in capsys.readouterr().err
