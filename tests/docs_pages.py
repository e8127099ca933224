"""Code blocks of the documentation, and a folder with everything they name: tiny models under the used names, rows."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_tokenizer import character_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import thrifty
from thrifty.run import embedded

__all__ = [
    "ROOT",
    "Block",
    "blocks",
    "embed",
    "furnish",
    "furnish_deltas",
    "furnish_readme",
    "shorter",
    "tiny_batches",
    "tiny_model",
]

ROOT = Path(__file__).parent.parent
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w+)(?P<more>[^`]*)$")
_NOT_RUN = re.compile(r"^ *<!-- not run: (?P<reason>.*\S) -->$")
_TITLE = re.compile(r'title="([^"]+)"')

_REQUESTS = [
    ("Play some jazz", "play(jazz)"),
    ("Wake me at six", "alarm(06:00)"),
    ("Rain on Sunday?", "weather(sunday)"),
]
_TEXT = "It was a bright cold day in spring, and the clocks were late again. " * 20


@dataclass(frozen=True)
class Block:
    """A fenced block. `title`: the file it is; `not_run`: why it is not run, as an HTML comment before it says."""

    place: str  # README.md:12
    language: str
    title: str | None
    text: str
    not_run: str | None


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """All blocks of a page with a language, in order."""
    lines = (page.read_text(encoding="utf-8") if text is None else text).splitlines()
    found, number, marker = [], 0, None
    while number < len(lines):
        if opened := _FENCE.match(lines[number]):
            end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == "```")
            code = textwrap.dedent("\n".join(lines[number + 1 : end])) + "\n"
            title = _TITLE.search(opened["more"])
            place = f"{page.name}:{number + 1}"
            found.append(Block(place, opened["language"], title and title[1], code, marker))
            number, marker = end, None
        elif lines[number].strip():
            not_run = _NOT_RUN.match(lines[number])
            marker = not_run and not_run["reason"]
        number += 1
    return found


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """Random weights; as many ids as the tokenizer of single characters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def tiny_batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    """Three rows each, all of them labelled."""
    draw = torch.Generator().manual_seed(0)
    made = [torch.randint(5, 97, (3, 16), generator=draw) for _ in range(count)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in made]


def _save(folder: Path, *, seed: int = 0) -> None:
    tiny_model(seed).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)


def embed(cache: Path) -> None:
    """Put the tiny model where `$THRIFTY_CACHE` is to hold smollm2-135m."""
    source = embedded.EMBEDDED["smollm2-135m"]
    _save(cache / "models" / f"smollm2-135m-{source.version}-float32-{embedded._LAYOUT}")


def furnish(folder: Path) -> None:
    """The files of rows that pages take for granted."""
    rows = [{"prompt": f"{text} ->", "completion": f" {call}"} for text, call in _REQUESTS * 4]
    pairs = [{"prompt": f"{text} ->", "chosen": f" {call}", "rejected": " no"} for text, call in _REQUESTS * 2]
    for name, made in (("requests", rows), ("held_out", rows[:2]), ("judged", rows[:2]), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    for name in ("general.txt", "text.txt"):
        (folder / name).write_text(_TEXT, encoding="utf-8")


def shorter(words: list[str]) -> list[str]:
    """The same `thrifty train`, of at most 40 steps, with few looks at gradients."""
    from thrifty.cli.verbs import _split
    from thrifty.run.config import load_config

    file, settings = _split(words[1:])
    steps = load_config(file, settings).training.get("max_steps", -1)
    return [*words, "probe_units=2", *([] if 0 < steps <= 40 else ["max_steps=4"])]


def furnish_readme(folder: Path) -> None:
    """A base in a folder, and deltas of it."""
    base = folder / "path/or/hub-id"
    _save(base)
    for seed, name in enumerate(("sql", "chat")):
        model = tiny_model()
        tuning = thrifty.attach(model, {"random_blocks": {"block_size": 16}}, budget=0.05, seed=seed)
        model(**tiny_batches(1)[0]).loss.backward()
        torch.optim.SGD(tuning.parameters(), lr=1.0).step()
        tuning.delta().save(folder / "out" / name / "delta")


def furnish_deltas(folder: Path, run: Callable[[str], None]) -> None:
    """Runs, and models beside them."""
    settings = "data.train=requests.jsonl max_steps=3 budget=2%"
    run(f"thrifty train model=smollm2-135m {settings} output_dir=out")
    run(f"thrifty train model=smollm2-135m {settings} output_dir=other seed=1")
    shutil.copytree(folder / "out", folder / "one")
    shutil.copytree(folder / "out", folder / "first")
    shutil.copytree(folder / "other", folder / "third")
    (folder / "second.yaml").write_text("model: {base: smollm2-135m, deltas: [first]}\n", encoding="utf-8")
    run(f"thrifty train second.yaml {settings} output_dir=second")
    run("thrifty export other --output tuned-model")
    for seed, name in enumerate(("some-model", "newer-model")):
        _save(folder / name, seed=seed)
    shutil.copytree(folder / "some-model", folder / "base-model")
