"""The configuration: every mistake of the file and the command line at once, and what of it does not fit together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from thrifty.core.errors import ThriftyError
from thrifty.core.method import parse_method

from ..arguments import schedule_problems, training_arguments, with_defaults
from ..config import RunConfig
from ..objectives import parse_objective, refuse_unsupported
from ..probe_batches import check_text
from ..quantized import refuse_quantized
from ..reader import read_config
from .report import Report

__all__ = ["Settings", "check_settings"]


# Part of an optimizer's name -> the distribution that has it; the first that fits.
_OPTIMIZERS = {
    **dict.fromkeys(("torch_4bit", "torch_8bit"), "torchao"),
    "galore": "galore-torch",
    "lomo": "lomo-optim",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
    "apollo": "apollo-torch",
    "stable_adamw": "torch-optimi",
    **dict.fromkeys(("bnb", "8bit", "paged", "ademamix", "lion_"), "bitsandbytes"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A configuration of which `broken` (top-level keys) are mistaken: the defaults are in their place. No arguments
    where transformers cannot make them."""

    config: RunConfig
    args: TrainingArguments | None
    broken: frozenset[str]


def check_settings(
    report: Report, source: str | os.PathLike[str] | Mapping[str, Any] | None, overrides: Sequence[str]
) -> Settings | None:
    """The configuration as far as it can be read; None where it is no run file at all."""
    report.section("configuration")
    try:
        config, reading = read_config(source, overrides)
    except ThriftyError as error:
        report.problem(str(error))
        return None
    for text in reading.problems:
        report.problem(text)
    with report.attempt():
        refuse_unsupported(config)  # with TRL missing it cannot be told what goes with it
        config = with_defaults(config)
    args = None
    wrong = list(schedule_problems(config))
    for text in wrong:
        if "eval_strategy" not in reading.broken and "data" not in reading.broken:
            report.problem(text)
    if not wrong:
        with report.attempt():
            args = training_arguments(config)
    if "method" not in reading.broken:
        with report.attempt():
            check_text(config)
        with report.attempt():
            refuse_quantized(config)
    _check_optimizer(report, config)
    forgetting = config.eval.forgetting
    if forgetting is not None and not Path(forgetting).is_file():
        report.problem(f"eval.forgetting: there is no file {forgetting!r}: name a plain text file")
    settings = Settings(config=config, args=args, broken=frozenset(reading.broken))
    report.say(_described(settings))
    return settings


def _check_optimizer(report: Report, config: RunConfig) -> None:
    """Optimizers of other packages, which transformers imports only when training starts."""
    name = str(config.training.get("optim", ""))
    needed = next((package for part, package in _OPTIMIZERS.items() if part in name), None)
    if needed is not None and find_spec(needed.removeprefix("torch-").replace("-", "_")) is None:
        report.problem(f"optim: {name} needs {needed}: pip install {needed}, or leave optim out")


def _described(settings: Settings) -> str:
    config = settings.config
    budget = "its own size" if config.budget is None else f"budget {config.budget}"
    rate = config.training["learning_rate"]
    method = "not readable" if "method" in settings.broken else parse_method(config.method).name
    text = f"method {method}, {budget}, objective {parse_objective(config.objective).name}, learning_rate {rate:g}"
    if settings.args is not None:
        args = settings.args
        text += f"; {args.per_device_train_batch_size} rows at a time"
        if args.gradient_accumulation_steps > 1:
            text += f", {args.gradient_accumulation_steps} times for one step"
        text += f", on {args.device.type}"
    return text
