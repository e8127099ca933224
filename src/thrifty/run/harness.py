"""The tasks of EleutherAI's evaluation harness, on a model, or on a base model with its delta (`eval --harness`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from thrifty.core.errors import ThriftyError, nearest

from .embedded import no_progress_bars
from .folder import Place
from .model import apply_delta, load_model, load_tokenizer

__all__ = ["Scores", "harness_scores", "harness_tasks", "run_harness"]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a metric of a task came to.

    values: that of each document, where the score is their plain mean; None where it is made otherwise.
    """

    score: float
    values: list[float] | None


def run_harness(place: Place, *, tasks: Sequence[str], folder: str | None = None) -> dict[str, float]:
    """`task/metric` -> value, as `lm_eval` computes it through its own model class for transformers.

    tasks: names and patterns, as `lm_eval --tasks` takes them. folder: more tasks, as YAML files, which may name Python
    functions that are then run. Takes from the configuration how
    the model is loaded, and `eval.batch_size`. ThriftyError where lm_eval is missing or knows no such task.
    """
    if not tasks:
        raise ThriftyError("--harness names no task (--harness arc_easy,piqa)")
    if folder is not None and not Path(folder).is_dir():
        raise ThriftyError(f"--harness-path: there is no folder {folder!r}")
    harness_tasks(tasks, folder=folder, where="--harness")
    config = place.config
    tokenizer = load_tokenizer(config.tokenizer or config.model, trust_remote_code=config.trust_remote_code)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model = load_model(
        config.model,
        dtype=config.dtype,
        quantize=config.quantize,
        trust_remote_code=config.trust_remote_code,
        device=device,
    )
    if place.delta is not None:
        model = apply_delta(place.delta, model=model, tokenizer=tokenizer)
    found = harness_scores(
        model.eval(), tokenizer, tasks=tasks, folder=folder, where="--harness", batch_size=config.eval.batch_size
    )
    return {name: scores.score for name, scores in found.items()}


def harness_tasks(tasks: Sequence[str], *, folder: str | None, where: str) -> list[str]:
    """The names of the tasks that `tasks` (names and patterns) stand for, as `lm_eval` knows them.

    ThriftyError where lm_eval is missing or knows no such task; it begins with `where`.
    """
    return _tasks(tasks, folder=folder, where=where)[1]


def _tasks(tasks: Sequence[str], *, folder: str | None, where: str) -> tuple[Any, list[str]]:
    """`lm_eval`'s task manager, and the names."""
    if find_spec("lm_eval") is None:
        raise ThriftyError(f"{where} needs lm_eval: pip install 'thrifty[harness]'")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder)
    names: list[str] = []
    for task in tasks:
        matching = manager.match_tasks([task])
        names += [name for name in matching if name not in names]
        if not matching:
            close = nearest(task, manager.all_tasks)
            hint = f"; did you mean {close!r}?" if close else ""
            raise ThriftyError(f"{where}: lm_eval knows no task {task!r}{hint} (`lm_eval ls tasks` lists all)")
    return manager, names


def harness_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str],
    folder: str | None = None,
    where: str,
    batch_size: int,
    limit: int | None = None,
) -> dict[str, Scores]:
    """`task/metric` -> its score and, where that is their mean, each document's value. `model` is in evaluation mode.

    limit: documents of each task, the first ones; None: all. The rest as in `harness_tasks`.
    """
    manager, names = _tasks(tasks, folder=folder, where=where)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model is given as an object
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    with no_progress_bars():
        found: Any = simple_evaluate(
            model=wrapped, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True, limit=limit
        )
    return _scores(found["results"], found["samples"])


def _scores(results: dict[str, dict[str, Any]], samples: dict[str, list[dict[str, Any]]]) -> dict[str, Scores]:
    """The numbers of each task, without their standard errors: `acc,none` is the metric `acc` after no filter."""
    scores = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, after = key.partition(",")
            if after and isinstance(value, int | float) and not metric.endswith("_stderr"):
                own = [one.get(metric) for one in samples.get(task, ()) if one["filter"] == after]
                name = f"{task}/{metric if after == 'none' else key}"
                scores[name] = Scores(score=float(value), values=_averaged(own, float(value)))
    return scores


def _averaged(values: Sequence[Any], score: float) -> list[float] | None:
    """`values` as numbers where `score` is their mean, else None: perplexities, F1, and groups of tasks are not."""
    if not values or not all(isinstance(value, Real | np.bool_) for value in values):
        return None
    numbers = [float(value) for value in values]
    return numbers if math.isclose(sum(numbers) / len(numbers), score, rel_tol=1e-9, abs_tol=1e-12) else None
