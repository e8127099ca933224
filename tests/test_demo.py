"""The demonstration: its grammar, the nearest neighbour it is held against, and the whole verb on a tiny model."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from families import config as tiny_config
from rich.console import Console
from tiny_tokenizer import character_tokenizer
from transformers import AutoModelForCausalLM

from thrifty.core.errors import ThriftyError
from thrifty.data.demo import Request, number_words, requests
from thrifty.data.demo_phrasings import FUNCTIONS
from thrifty.data.demo_values import VALUES
from thrifty.run.demo import _judge, demo
from thrifty.run.nearest import jaccard_nearest, tf_idf_nearest

TRAIN = requests("train", count=800, seed=0)
TEST = requests("test", count=96, seed=0)


def test_requests_are_fixed_by_the_seed_and_distinct() -> None:
    assert requests("test", count=96, seed=0) == TEST
    assert requests("test", count=96, seed=1) != TEST
    assert len({request.text for request in TRAIN}) == len(TRAIN)
    assert not {request.text for request in TRAIN} & {request.text for request in TEST}
    with pytest.raises(ValueError, match="split must be one of"):
        requests("valid", count=1, seed=0)


def test_calls_are_json_with_the_arguments_of_their_function() -> None:
    for request in TRAIN + TEST:
        call = json.loads(request.call)
        assert call["name"] == request.function
        known = FUNCTIONS[request.function].arguments
        assert [name for name in known if name in call["arguments"]] == list(call["arguments"])
        assert call["arguments"]
        assert "{" not in request.text
    assert {request.function for request in TEST} == set(FUNCTIONS)
    counts = [sum(request.function == name for request in TEST) for name in FUNCTIONS]
    assert max(counts) - min(counts) <= 1


def test_every_value_of_a_call_can_be_read_from_its_request() -> None:
    """Texts are copied, numbers are said in words: nothing is to be guessed."""
    for request in TRAIN + TEST:
        said = request.text
        for filler in (" uh ", " um ", " er ", " ah ", " hmm ", " you know "):
            said = said.replace(filler, " ")
        for name, value in json.loads(request.call)["arguments"].items():
            if name in ("state", "time"):
                continue
            expected = number_words(value) if isinstance(value, int) else value
            assert expected in said, request


def test_phrasings_and_open_values_of_the_test_split_are_new() -> None:
    for function in FUNCTIONS.values():
        learned = {phrasing.words for phrasing in function.phrasings("train")}
        assert not learned & {phrasing.words for phrasing in function.phrasings("test")}
    for slot, values in VALUES.items():
        if isinstance(values, dict):
            assert not set(values["train"]) & set(values["test"]), slot
    for slot in ("brightness", "degrees", "minutes"):
        numbers = [
            {c["arguments"][slot] for c in (json.loads(r.call) for r in split) if slot in c["arguments"]}
            for split in (TRAIN, TEST)
        ]
        assert numbers[1] - numbers[0]


def test_every_slot_has_values_and_every_fixed_argument_a_name() -> None:
    for function in FUNCTIONS.values():
        for split in ("train", "test"):
            for phrasing in function.phrasings(split):
                slots = re.findall(r"{(\w+)}", phrasing.words)
                assert set(slots) <= VALUES.keys() | {"time"}
                assert {*slots, *phrasing.fixed} <= set(function.arguments)


@pytest.mark.parametrize("make", [jaccard_nearest, tf_idf_nearest])
def test_the_nearest_text_shares_its_telling_words(make) -> None:  # type: ignore[no-untyped-def]
    nearest = make(["play jazz in the kitchen", "set the alarm for six", "the the the", "play bach please"])
    assert nearest("please put some jazz on in the kitchen") == 0
    assert nearest("an alarm for six") == 1
    assert nearest("bach") == 3
    assert nearest("words of none") == 0


def test_the_verdict_asks_for_the_rise_and_the_margin() -> None:
    console = Console(file=io.StringIO())
    assert _judge(console, before=0.0, after=0.31, nearest=0.1, asked=100)
    assert not _judge(console, before=0.0, after=0.29, nearest=0.0, asked=100)
    assert not _judge(console, before=0.0, after=0.6, nearest=0.45, asked=100)
    assert "NOT learned" in console.file.getvalue()  # type: ignore[attr-defined]


def tiny_checkpoint(folder: Path) -> Path:
    """Two layers, characters for tokens, and room for whole requests."""
    config = tiny_config("llama", layers=2)
    config.max_position_embeddings = 512
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def test_the_demonstration_runs_and_says_that_a_tiny_model_did_not_learn(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    overrides = [
        f"model={tiny_checkpoint(tmp_path / 'model')}",
        "max_steps=2",
        "max_length=400",
        "eval.exact_match=5",
        "eval.max_new_tokens=8",
        "budget=0.05",
        "method.smt.block_size=8",
        "bf16=false",
    ]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert demo(tmp_path / "out", overrides=overrides, console=console) == 1
    folder = tmp_path / "out-2"
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in shown
    assert "NOT learned" in shown
    assert str(folder / "summary.json") in shown
    assert "full fine-tuning" in shown
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["evaluation"].keys() == {"before", "after"}
    rows = [json.loads(line) for line in (folder / "data" / "held_out.jsonl").read_text().splitlines()]
    assert [row["messages"][1]["content"] for row in rows] == [request.text for request in TEST]
    assert rows[0] == Request(text=TEST[0].text, call=TEST[0].call, function=TEST[0].function).row()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_the_demonstration_needs_its_comparison(tmp_path: Path) -> None:
    with pytest.raises(ThriftyError, match=r"leave eval\.before"):
        demo(tmp_path / "out", overrides=["eval.before=false"])
    assert not (tmp_path / "out").exists()
