"""`run_eval`: a base model, a base and a delta, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import build
from tiny_tokenizer import character_tokenizer

from thrifty.core.errors import ThriftyError
from thrifty.data import encode, load
from thrifty.data.source import Source
from thrifty.run.config import load_config
from thrifty.run.evaluate import evaluate, run_eval
from thrifty.run.model import load_model
from thrifty.update.tuning import attach


def checkpoint(folder: Path) -> Path:
    """A tiny model, its tokenizer and four rows."""
    build("llama").save_pretrained(folder / "model")
    character_tokenizer().save_pretrained(folder / "model")
    lines = [f'{{"prompt": "{a} and one is ", "completion": "{b}"}}\n' for a, b in ("12", "23", "34", "45")]
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "general.txt").write_text("the cat is on the mat. " * 20)
    return folder / "model"


def test_a_base_and_its_delta_measure_as_the_trained_model(tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    settings = {
        "model": str(model),
        "data": {"eval": str(tmp_path / "rows.jsonl")},
        "eval": {"exact_match": 4, "choice": 4, "forgetting": str(tmp_path / "general.txt")},
        "max_length": 48,
    }
    config = load_config(settings, needs_training_data=False)
    before = run_eval(str(model), delta=None, config=config)
    assert before.keys() == {"loss", "exact_match", "choice", "forgetting"}

    tokenizer, examples = character_tokenizer(), load(Source(str(tmp_path / "rows.jsonl")), seed=0)
    ids = torch.tensor([encode(examples[0], tokenizer, max_length=48).input_ids])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    trained = load_model(str(model))  # with the attention that it will be loaded with again
    tuning = attach(trained, {"smt": {"block_size": 8}}, budget=0.05, batches=[batch], seed=0)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.05)
    for _ in range(3):
        trained(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuning.delta().save(tmp_path / "delta")
    expected = evaluate(tuning.finish(), tokenizer, examples, config.eval, max_length=48)
    assert run_eval(str(model), delta=str(tmp_path / "delta"), config=config) == expected
    assert expected["loss"] != before["loss"]


def test_there_must_be_something_to_measure(tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    config = load_config({"model": str(model)}, needs_training_data=False)
    with pytest.raises(ThriftyError, match=r"nothing to measure: give data\.eval"):
        run_eval(str(model), delta=None, config=config)
    text_only = load_config(
        {"model": str(model), "eval": {"forgetting": str(tmp_path / "general.txt")}, "max_length": 48},
        needs_training_data=False,
    )
    assert run_eval(str(model), delta=None, config=text_only).keys() == {"forgetting"}
