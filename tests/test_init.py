"""`thrifty init`: what it writes suits the data and the model, and is what `thrifty validate` accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_run import save_checkpoint

from thrifty.cli.main import main
from thrifty.run.config import RunConfig, load_config
from thrifty.run.init import run_file
from thrifty.run.suggest import suggest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def written(folder: Path, model: Path, data: Path, *words: str) -> tuple[RunConfig, str]:
    """What `thrifty init` writes for the data, and its text; it validates."""
    file = folder / "run.yaml"
    assert main(["init", str(file), "--model", str(model), "--data", str(data), *words]) == 0
    return load_config(file), file.read_text(encoding="utf-8")


def test_what_it_writes_validates(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"what is {i}?", "answer": "yes" if i % 2 else "no"} for i in range(300)]
    config, text = written(tmp_path, model, write(tmp_path / "rows.jsonl", rows))
    out = capsys.readouterr().out
    assert f"Looked at {tmp_path}/rows.jsonl: 300 rows, instruction + output.\n" in out
    assert "Looked at LlamaForCausalLM, 34,840 numbers; " in out
    (train,), (held_out,) = config.data.train, config.data.eval
    assert train.columns == held_out.columns == {"instruction": "question", "output": "answer"}
    assert (train.split, held_out.split) == ("[:-30]", "[-30:]")
    assert (config.eval.choice, config.eval.choices, config.eval.exact_match) == (30, ["no", "yes"], 0)
    assert config.max_length == 64, "what the rows need, and the model's positions"
    assert config.training["max_steps"] == 51, "three times each of 270 rows, 16 at a time"
    assert config.training["per_device_train_batch_size"] == 16
    assert "; the longest of 300 rows has " in text
    assert all("# " in line for line in text.splitlines() if line)
    assert main(["validate", str(tmp_path / "run.yaml"), "budget=5%"]) == 0
    assert "problem" not in capsys.readouterr().out.replace("no problems", "")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"prompt": "1+1=", "completion": "2"}] * 30, {"data.columns": None, "max_steps": 37, "exact_match": 0}),
        ([{"text": "12 34"}] * 200, {"data.columns": None, "exact_match": 0, "split": "[:-20]"}),
        ([{"dialog": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]}], {"max_steps": 1}),
        ([{"Query": "a", "Response": "b"}], {"data.columns": {"instruction": "Query", "output": "Response"}}),
        ([{"prompt": f"{i}", "completion": "7" * (i % 60)} for i in range(1, 200)], {"exact_match": 20}),
    ],
    ids=["prompt", "text", "dialog", "columns", "answers"],
)
def test_what_it_makes_of_rows(
    model: Path, tmp_path: Path, rows: list[dict[str, Any]], expected: dict[str, Any]
) -> None:
    config, _ = written(tmp_path, model, write(tmp_path / "rows.jsonl", rows))
    (train,) = config.data.train
    found = {
        "data.columns": train.columns,
        "split": train.split,
        "max_steps": config.training["max_steps"],
        "exact_match": config.eval.exact_match,
    }
    assert {key: found[key] for key in expected} == expected


def test_a_text_file_and_held_out_rows(model: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("all of it\n" * 100, encoding="utf-8")
    config, _ = written(tmp_path, model, tmp_path / "book.txt")
    assert (config.data.eval, config.max_length, config.training["max_steps"]) == ((), 64, 300)
    (tmp_path / "run.yaml").unlink()
    rows = [{"prompt": "1+1=", "completion": "2"}] * 300
    held_out = write(tmp_path / "held.jsonl", rows[:40])
    config, _ = written(tmp_path, model, write(tmp_path / "rows.jsonl", rows), "--eval", str(held_out))
    assert config.data.train[0].split is None
    assert config.data.eval[0].path == str(held_out)
    assert config.eval.exact_match == 40


NAMES = ["prompt", "completion", "question", "answer", "text", "dialog", "chosen", "rejected", "label", "choices"]
VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.lists(st.text(max_size=3), max_size=3)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5), min_size=1, max_size=3))
def test_whatever_the_rows_a_file_is_written(model: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    data = str(write(tmp_path / "any.jsonl", rows * 40))
    found = suggest(model=str(model), train=data)
    text = run_file(model=str(model), train=data, values=found.values, why=found.why, notes=found.seen)
    (tmp_path / "any.yaml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "any.yaml").data.train[0].path == data
    assert found.seen or found.unseen


def test_pairs_are_for_dpo(model: Path, tmp_path: Path) -> None:
    config, text = written(
        tmp_path, model, write(tmp_path / "pairs.jsonl", [{"prompt": "1", "chosen": "2", "rejected": "3"}] * 200)
    )
    assert config.objective == "dpo"
    assert "train_sampling_strategy" not in config.training
    assert "# train_sampling_strategy: random" in text


@pytest.mark.parametrize("content", [None, "", "{}\n", "[1]\n", '{"a": 1}\n'], ids=repr)
def test_data_that_cannot_be_read_yet(tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """Then the model is left alone too (its name here is no model)."""
    data = tmp_path / "rows.jsonl"
    if content is not None:
        data.write_text(content, encoding="utf-8")
    config, text = written(tmp_path, Path("no_model"), data)
    assert (config.max_length, config.training["max_steps"]) == (1024, 300)
    assert capsys.readouterr().out.startswith(f"Not looked at: {data}")
    assert f"# Not looked at: {data}" in text


def test_a_model_that_does_not_fit_beside_much_else(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thrifty.run.suggest.free_memory", lambda device: 250_000)
    rows = [{"prompt": "1+1=", "completion": "2"}] * 20
    config, text = written(tmp_path, model, write(tmp_path / "rows.jsonl", rows))
    training = config.training
    assert config.dtype == "bfloat16"
    assert "; float32 would take 136.1 KiB of 244.1 KiB\n" in text
    assert training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] == 16
    assert training["per_device_train_batch_size"] == 1
    assert yaml.safe_load(text)["gradient_checkpointing"] is True
