"""A tiny checkpoint, its tokenizer and rows, so that a whole run takes a second."""

from __future__ import annotations

import gc
import json
import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from families import build
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["configuration", "prepare", "save_checkpoint", "start", "write_rows"]

# Imports once, in a clean process that forks a child for each run.
_CHILDREN = multiprocessing.get_context("forkserver")
_CHILDREN.set_forkserver_preload(["thrifty.run.train", "thrifty.cli.main", "transformers.models.llama.modeling_llama"])

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,:;?!-+*/=()<>{}[]\"'_\n"


def save_checkpoint(folder: Path, *, family: str = "llama", dropout: float = 0.0, layers: int = 2) -> Path:
    """A tiny model and a tokenizer of single characters, as transformers saves them."""
    model = build(family, layers=layers)
    names = ("resid_pdrop", "embd_pdrop", "attn_pdrop") if family == "gpt2" else ("attention_dropout",)
    for name in names:
        setattr(model.config, name, dropout)
    model.save_pretrained(folder)
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *_LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def write_rows(file: Path, *, rows: int, seed: int = 0) -> Path:
    """Prompts of sums and their completions, of uneven length."""
    draw = random.Random(seed)
    lines = []
    for _ in range(rows):
        a, b = draw.randrange(10 ** draw.randrange(1, 5)), draw.randrange(100)
        lines.append(json.dumps({"prompt": f"{a}+{b}=", "completion": str(a + b)}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def configuration(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run in `folder` of what `prepare` put there: 22 rows, batches of 4, epochs of 6 steps with a short last one."""
    return {
        "model": str(folder / "model"),
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")},
        "method": {"smt": {"block_size": 8}},
        "budget": 0.05,
        "eval": {"loss": True},
        "output_dir": str(folder / "out"),
        "max_length": 48,
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 3,
        "seed": 7,
        "probe_units": 2,
        **changes,
    }


def prepare(folder: Path, *, family: str = "llama", dropout: float = 0.0) -> Path:
    """Everything that `configuration` names."""
    gc.freeze()  # a run collects garbage; what importing made need not be searched each time
    save_checkpoint(folder / "model", family=family, dropout=dropout)
    write_rows(folder / "train.jsonl", rows=22)
    write_rows(folder / "eval.jsonl", rows=9, seed=1)
    return folder


def start(target: Callable[..., Any], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """Run a function of a test module in a process of its own."""
    child = _CHILDREN.Process(target=target, args=arguments)
    child.start()
    return child
