"""`thrifty eval --harness`: the tasks of EleutherAI's evaluation harness, on a base model with its delta."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from thrifty.core.errors import ThriftyError, nearest

from .embedded import no_progress_bars
from .folder import Place
from .model import apply_delta, load_model, load_tokenizer

__all__ = ["run_harness"]


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
    if find_spec("lm_eval") is None:
        raise ThriftyError("--harness needs lm_eval: pip install 'thrifty[harness]'")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model is given as an object
    manager = TaskManager(include_path=folder)
    names: list[str] = []
    for task in tasks:
        matching = manager.match_tasks([task])
        names += [name for name in matching if name not in names]
        if not matching:
            close = nearest(task, manager.all_tasks)
            hint = f"; did you mean {close!r}?" if close else ""
            raise ThriftyError(f"--harness: lm_eval knows no task {task!r}{hint} (`lm_eval ls tasks` lists all)")
    config = place.config
    tokenizer = load_tokenizer(config.tokenizer or config.model, trust_remote_code=config.trust_remote_code)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model = load_model(config.model, dtype=config.dtype, trust_remote_code=config.trust_remote_code, device=device)
    if place.delta is not None:
        model = apply_delta(place.delta, model=model, tokenizer=tokenizer)
    wrapped = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=config.eval.batch_size)
    with no_progress_bars():
        found: Any = simple_evaluate(
            model=wrapped, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=False
        )
    return _scores(found["results"])


def _scores(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The numbers of each task, without their standard errors: `acc,none` is the metric `acc` after no filter."""
    scores = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, after = key.partition(",")
            if after and isinstance(value, int | float) and not metric.endswith("_stderr"):
                scores[f"{task}/{metric if after == 'none' else key}"] = float(value)
    return scores
