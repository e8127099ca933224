"""The embedded model's own tokenizer: its template, its default system prompt, its end-of-turn token.

Rows in the form of SNIPS and GSM8K are in the test; with DATA set to a folder of files, all of theirs are checked too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from thrifty.data import Source, answer, chat_prompt, encode_all, load, prompt_and_reference, stop_ids
from thrifty.run.model import load_tokenizer

pytestmark = pytest.mark.real_model
ROWS = [
    {
        "messages": [
            {"role": "user", "content": "add step to me to the 50 clásicos playlist"},
            {"role": "assistant", "content": '{"intent": "AddToPlaylist", "slots": {"playlist": "50 clásicos"}}'},
        ]
    },
    {
        "prompt": [{"role": "user", "content": "Half of 14, plus 3?"}],
        "completion": [{"role": "assistant", "content": "Half of 14 is 14/2 = 7.\n\nSo 7 + 3 = 10.\n#### 10"}],
    },
    {"instruction": "true or false: water is wet", "input": "", "output": "\n true\n"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("smollm2-135m")


def check(path: Path, tokenizer: PreTrainedTokenizerBase, prompts: int = 300) -> None:
    examples = load(Source(str(path)), seed=0)
    rows, report = encode_all(examples, tokenizer, max_length=2048)
    assert report.truncated_rows == report.rows_without_labels == 0
    for example, row in zip(examples, rows, strict=True):
        trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert tokenizer.decode(trained) == f"{answer(example)}<|im_end|>"
    for example, row in list(zip(examples, rows, strict=True))[:prompts]:
        asked = example.messages[:-1]
        prompt, reference = prompt_and_reference(example, tokenizer)
        assert prompt == row["input_ids"][: len(prompt)] == chat_prompt(asked, tokenizer)
        assert prompt == tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        assert reference == answer(example).strip()


def test_answers_and_prompts(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    check(path, tokenizer)
    if "DATA" in os.environ:
        for name in ("snips_train", "snips_valid", "gsm8k_train", "arc_easy_train", "boolq_valid"):
            check(Path(os.environ["DATA"]) / f"{name}.jsonl", tokenizer)


def test_default_system_prompt_and_end_of_turn(tokenizer):
    prompt = tokenizer.decode(chat_prompt([{"role": "user", "content": "Hi"}], tokenizer))
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    own = chat_prompt([{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}], tokenizer)
    assert tokenizer.decode(own).startswith("<|im_start|>system\nBe brief<|im_end|>")
    assert tokenizer.convert_ids_to_tokens(stop_ids(tokenizer)) == ["<|im_end|>"]
