"""`thrifty demo`: a real model learns to turn spoken requests into JSON calls, and shows that it did."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from thrifty.core.errors import ThriftyError
from thrifty.core.files import write_text
from thrifty.data import load
from thrifty.data.demo import INSTRUCTION, Request, requests
from thrifty.data.demo_phrasings import FUNCTIONS

from .config import RunConfig, load_config
from .display import human_bytes, human_time
from .evaluation import Answered, answer_all, evaluating, questions
from .model import load_model, load_tokenizer
from .nearest import jaccard_nearest, tf_idf_nearest
from .train import train

__all__ = ["MARGIN", "RISE", "demo", "settings"]

RISE = 0.3  # of held-out exact match by training, at least
MARGIN = 0.2  # over answering with the nearest training request, at least
_TRAIN_ROWS, _TEST_ROWS = 1600, 96
_SHOWN = 4
_TRAIN, _HELD_OUT = Path("data", "train.jsonl"), Path("data", "held_out.jsonl")


def settings(output_dir: str | Path) -> dict[str, Any]:
    """The demonstration's run, as a run file would say it."""
    folder = Path(output_dir)
    return {
        "model": "smollm2-135m",
        "data": {"train": str(folder / _TRAIN), "eval": str(folder / _HELD_OUT)},
        "method": {"smt": {"scope": "global"}},  # what the README's figure was measured with
        "budget": 0.01,
        "max_steps": 150,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,
        "warmup_steps": 10,
        "bf16": _bfloat16_is_fast(),
        "max_length": 128,
        "eval": {"loss": True, "exact_match": _TEST_ROWS, "before": True, "batch_size": 48},
        "save_strategy": "no",
        "seed": 0,
        "output_dir": str(folder),
    }


def _bfloat16_is_fast() -> bool:
    """Whether matrix products in bfloat16 run in hardware; elsewhere they are several times slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def demo(output_dir: str | Path = "out/demo", *, overrides: Sequence[str] = (), console: Console | None = None) -> int:
    """Train, and print what was learned.

    Args:
        output_dir: where everything goes; while it is taken, the next of `demo-2`, `demo-3`, ... is.
        overrides: `key=value` texts over `settings`.
        console: standard output unless given.

    Returns:
        0 if held-out exact match rose by `RISE` and beats answering with the nearest training request by `MARGIN`,
        else 1.
    """
    start = time.perf_counter()
    console = Console() if console is None else console
    folder = _free(Path(output_dir))
    config = load_config(settings(folder), overrides)
    if not (config.eval.before and config.eval.exact_match):
        raise ThriftyError("the demonstration compares answers: leave eval.before and eval.exact_match as they are")
    learned = requests("train", count=_TRAIN_ROWS, seed=0)
    held_out = requests("test", count=_TEST_ROWS, seed=0)
    _write(learned, folder / _TRAIN)
    _write(held_out, folder / _HELD_OUT)
    _say(
        console,
        f"Spoken requests to JSON calls of {len(FUNCTIONS)} functions: {len(learned):,} requests to learn from, "
        f"{len(held_out)} held out, in other words and about other things.",
        f"  {learned[0].text}",
        f"  {learned[0].call}",
        "The base model answers the held-out requests first, then training begins.",
    )

    said = _answers_before(config)
    run = train(config.to_dict())
    _say(console, "")
    _show_answers(said, folder / "answers.jsonl", console)
    _show_cost(run.summary, console)
    scores = {name: run.summary["evaluation"][name]["exact_match"] for name in ("before", "after")}
    asked = held_out[: config.eval.exact_match]
    learnt = _judge(console, **scores, nearest=_nearest_score(asked, learned), asked=len(asked))
    _say(
        console,
        f"all in {human_time(time.perf_counter() - start)}; summary: {folder / 'summary.json'}",
        f"talk to it: thrifty chat {folder} --system {json.dumps(INSTRUCTION)}",
    )
    return 0 if learnt else 1


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _free(folder: Path) -> Path:
    """`folder`, or the first of `folder-2`, `folder-3`, ... that holds nothing."""
    number, free = 1, folder
    while free.exists() and any(free.iterdir()):
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def _write(made: Sequence[Request], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(request.row(), ensure_ascii=False) + "\n" for request in made))


def _answers_before(config: RunConfig) -> list[Answered]:
    """What the base model says to the first held-out requests."""
    tokenizer = load_tokenizer(config.tokenizer or config.model, trust_remote_code=config.trust_remote_code)
    model = load_model(config.model, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
    rows = load(config.data.eval, seed=config.seed)[:_SHOWN]
    with evaluating(model):
        return answer_all(model, tokenizer, questions(rows, tokenizer), batch_size=_SHOWN)


def _show_answers(before: Sequence[Answered], answers_file: Path, console: Console) -> None:
    after = [json.loads(line) for line in answers_file.read_text(encoding="utf-8").splitlines()]
    table = Table(title="held-out requests", title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for old, new in zip(before, after):
        assert old.question == new["question"], "both runs answer the held-out requests in their order"
        mark = "right" if new["correct"] else f"wrong: {new['reference']}"
        table.add_row("request", Text(old.question, style="bold"))
        table.add_row("  before", Text(" ".join(old.answer.split()), style="dim"))
        table.add_row("  after", Text(f"{new['answer']}  ({mark})", style="green" if new["correct"] else "red"))
    console.print(table)


def _show_cost(summary: Mapping[str, Any], console: Console) -> None:
    """Bytes that training holds beside the activations, and those of full fine-tuning with AdamW in float32."""
    trained = summary["trainable_parameters"]
    total = round(trained / summary["trainable_share"])
    table = Table(box=None, pad_edge=False, title="memory that training holds", title_justify="left")
    for name in ("", "weights", "gradients", "optimizer", "together"):
        table.add_column(name, justify="right" if name else "left")
    copies = 2 * trained if trained < total else 0  # each trained number's original and its offset, beside the model
    for name, weights, moving in (
        (f"this run ({trained:,} numbers, {trained / total:.1%})", total + copies, trained),
        (f"full fine-tuning ({total:,} numbers)", total, total),
    ):
        held = (4 * weights, 4 * moving, 8 * moving)
        table.add_row(name, *map(human_bytes, (*held, sum(held))))
    console.print(table)
    _say(
        console,
        f"measured: {human_bytes(summary['peak_memory_bytes'])} above the loaded weights at the peak, activations "
        f"included; {human_time(summary['train_seconds'])} of training, {human_time(summary['probe_seconds'])} of them "
        "to choose what to train",
    )


def _judge(console: Console, *, before: float, after: float, nearest: float, asked: int) -> bool:
    learnt = after - before >= RISE and after - nearest >= MARGIN
    _say(
        console,
        f"exact match on {asked} held-out requests",
        f"  before training                  {before:6.1%}",
        f"  the nearest training request's   {nearest:6.1%}",
        f"  after training                   {after:6.1%}",
        f"{'learned' if learnt else 'NOT learned'}: {after - before:+.1%} by training (at least {RISE:+.0%} is asked "
        f"for), {after - nearest:+.1%} against the nearest training request ({MARGIN:+.0%})",
    )
    return learnt


def _nearest_score(asked: Sequence[Request], learned: Sequence[Request]) -> float:
    """Exact match of the nearest training request's call, by the better of two measures of nearness."""
    texts = [request.text for request in learned]
    scores = []
    for make in (jaccard_nearest, tf_idf_nearest):
        nearest = make(texts)
        scores.append(sum(learned[nearest(request.text)].call == request.call for request in asked) / len(asked))
    return max(scores)
