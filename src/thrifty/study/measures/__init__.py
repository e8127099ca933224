"""What a task measures, each as a ratio of sums over rows, so that one bootstrap serves all.

`check` reads a task's `measures` before anything runs, `measure` takes them of a model, `better` tells which way is up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from thrifty.data.readers import expand
from thrifty.run.evaluation import evaluating

from .choice import measure_choice
from .exact_match import measure_exact_match
from .forgetting import measure_forgetting
from .harness import measure_harness
from .loss import measure_loss
from .structured import measure_structured, references
from .subject import Found, Subject
from .wanted import check, read

__all__ = ["Found", "Subject", "better", "check", "measure"]

_LOWER_LAST = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


def measure(subject: Subject, wanted: Mapping[str, Any]) -> Found:
    """What `wanted` (a task's `measures`, see `Wanted`) asks for, by name; the model is left as it was.

    Each is {"rows": [[numerator, denominator], ...]}, and its score the ratio of the sums, or {"score": x} where
    lm_eval gives no more. `choice` has "majority" beside its rows. `structured` gives `json_valid`, `<label>_accuracy`
    and `slot_f1`; `harness` gives `task/metric` for each metric of each task. ThriftyError as in `check`.
    """
    asked = read(wanted, where="measures")
    structure = asked.structure
    if structure:
        references(subject, structure)  # a mistake in a row is told before minutes of generating
    found: Found = {}
    with evaluating(subject.model):
        if asked.loss:
            found |= measure_loss(subject, asked.loss)
        if asked.choice:
            found |= measure_choice(subject, asked.choice, choices=asked.choices)
        if asked.forgetting:
            found |= measure_forgetting(subject, asked.forgetting)
        if asked.exact_match and structure:  # those of the larger number serve both
            subject.answers(max(asked.exact_match, structure.rows, key=_many))
        if asked.exact_match:
            found |= measure_exact_match(subject, asked.exact_match)
        if structure:
            found |= measure_structured(subject, structure)
        if asked.harness:
            folder = None if asked.harness_path is None else expand(asked.harness_path)
            found |= measure_harness(subject, asked.harness, folder=folder, limit=asked.harness_limit)
    return found


def better(name: str) -> Literal["higher", "lower"]:
    """Which way a measure named `name` gets better."""
    lower = name in ("loss", "forgetting") or ("/" in name and name.rpartition("/")[2] in _LOWER_LAST)
    return "lower" if lower else "higher"


def _many(rows: int | bool) -> float:
    return float("inf") if rows is True else rows
