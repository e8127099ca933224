"""Evaluation: loss, greedy exact match, multiple choice, and what was forgotten."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from thrifty.core.errors import ThriftyError
from thrifty.core.files import write_text
from thrifty.data import Example

from .config import EvalConfig, RunConfig
from .evaluation import (
    Answered,
    answer_all,
    choose,
    evaluating,
    example_losses,
    file_losses,
    mean_of,
    option_lists,
    questions,
)
from .model import ModelName, apply_delta, load_model, load_tokenizer
from .rows import answered_examples

__all__ = ["evaluate", "examples_of", "first_of", "first_row", "run_eval"]

T = TypeVar("T")


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: EvalConfig,
    *,
    max_length: int,
    answers_file: str | Path | None = None,
) -> dict[str, float]:
    """What `config` asks for, by name; the model is left as it was.

    - `loss`: mean per label over all `examples`, each cut at `max_length` as in training.
    - `exact_match`: the share of the first rows whose greedy answer is the reference, stripped, character by character.
    - `choice`: the share of the first rows whose likeliest option is the reference.
    - `forgetting`: mean loss per token of a plain text file (its first 64 windows of at most 512 tokens).

    Args:
        examples: the evaluation rows; `exact_match` and `choice` take the first of them, in their order.
        max_length: tokens.
        answers_file: where the greedy answers go, one JSON object {question, answer, reference, correct} a line.
    """
    scores: dict[str, float] = {}
    with evaluating(model):
        if config.loss and examples:
            sums = example_losses(model, tokenizer, examples, max_length=max_length, batch_size=config.batch_size)
            scores["loss"] = mean_of(sums)
        if config.exact_match:
            asked = questions(first_of(examples, config.exact_match, "exact_match"), tokenizer)
            answered = answer_all(
                model, tokenizer, asked, batch_size=config.batch_size, max_new_tokens=config.max_new_tokens
            )
            scores["exact_match"] = sum(a.correct for a in answered) / len(answered)
            if answers_file is not None:
                _write_answers(answered, Path(answers_file))
        if config.choice:
            picked = first_of(examples, config.choice, "choice")
            texts = option_lists(picked, given=config.choices, among=examples)
            chosen = choose(model, tokenizer, picked, texts, batch_size=config.batch_size)
            scores["choice"] = sum(c.correct for c in chosen) / len(chosen)
        if config.forgetting:
            sums = file_losses(model, tokenizer, config.forgetting, max_length=max_length, batch_size=config.batch_size)
            scores["forgetting"] = mean_of(sums)
    return scores


def first_row(config: EvalConfig) -> EvalConfig:
    """One answer and one choice: what cannot be measured fails before training, not after it."""
    if config.forgetting is not None and not Path(config.forgetting).is_file():
        raise ThriftyError(f"eval.forgetting: there is no file {config.forgetting!r}: name a plain text file")
    exact_match, choice = min(1, config.exact_match), min(1, config.choice)
    return dataclasses.replace(config, loss=False, exact_match=exact_match, choice=choice, forgetting=None)


def first_of(examples: Sequence[T], rows: int | bool, name: str) -> Sequence[T]:
    """The first `rows` rows; all of them for True."""
    if not examples:
        raise ThriftyError(f"eval.{name} needs data.eval: rows to evaluate on")
    return examples if rows is True else examples[:rows]


def _write_answers(answered: Sequence[Answered], file: Path) -> None:
    lines = [json.dumps({**dataclasses.asdict(a), "correct": a.correct}, ensure_ascii=False) + "\n" for a in answered]
    write_text(file, "".join(lines))


def run_eval(model: ModelName, *, delta: str | None, config: RunConfig) -> dict[str, float]:
    """Load a model (an embedded name, a folder, a hub id), put `delta` on it, and evaluate it as `config` says.

    On the accelerator where there is one. Nothing is written.
    """
    examples = examples_of(config)
    tokenizer = load_tokenizer(config.tokenizer or model, trust_remote_code=config.trust_remote_code)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    loaded: nn.Module = load_model(
        model,
        dtype=config.dtype,
        quantize=config.quantize,
        trust_remote_code=config.trust_remote_code,
        device=device,
    )
    if delta is not None:
        loaded = apply_delta(delta, model=loaded, tokenizer=tokenizer)
    return evaluate(loaded, tokenizer, examples, config.eval, max_length=config.max_length)


def examples_of(config: RunConfig) -> Sequence[Example]:
    """The rows to evaluate on, if any. ThriftyError where there is nothing to measure at all."""
    if not config.data.eval and not config.eval.forgetting:
        raise ThriftyError("nothing to measure: give data.eval=rows.jsonl, or eval.forgetting=text.txt")
    return answered_examples(config)
