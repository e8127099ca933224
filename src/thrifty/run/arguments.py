"""RunConfig -> transformers.TrainingArguments: thrifty's defaults, and what its trainer cannot honour is refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from transformers import TrainingArguments

from thrifty.core.errors import ThriftyError, unknown
from thrifty.core.method import Method, Steps
from thrifty.optim import Muon

from .config import RunConfig
from .objectives import parse_objective, trl_arguments
from .sharding import sharding_problems
from .zero import use_zero, zero_problems

__all__ = ["keeps_best", "schedule_problems", "steps_of", "training_arguments", "with_defaults"]

# Where the stock default does not suit a fine-tuning of a few hundred steps.
_DEFAULTS = {"logging_steps": 10, "logging_first_step": True, "save_steps": 100}

_MUON = "muon"  # an `optim` that transformers does not have

_TRACKERS = ("tensorboard", "trackio")


def with_defaults(config: RunConfig) -> RunConfig:
    """`config` with thrifty's own defaults and the evaluation schedule filled in, as `run.yaml` has it."""
    given = dict(config.training)
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        if old in given:
            given.setdefault(old.replace("gradient", "activation"), given.pop(old))
    if config.checkpoint_layers is not None:
        given.setdefault("activation_checkpointing", config.checkpoint_layers > 0)
    training = {**_DEFAULTS, **given}
    if parse_objective(config.objective).uses_trl:
        del training["save_steps"]
        training |= {"save_strategy": "no"}
    if "eval_steps" in training:
        training.setdefault("eval_strategy", "steps")
    if training.get("eval_strategy", "no") == "steps":
        training.setdefault("eval_steps", training["save_steps"])
    return dataclasses.replace(config, training=training)


def keeps_best(config: RunConfig) -> bool:
    """Whether the result is the best checkpoint, not the last: with early stopping, or where it is asked for."""
    return bool(config.training.get("load_best_model_at_end", config.early_stopping_patience is not None))


def training_arguments(config: RunConfig) -> TrainingArguments:
    """The arguments of the trainer. ThriftyError for what it cannot honour."""
    training = dict(config.training)
    for text in schedule_problems(config):
        raise ThriftyError(text)
    for name in ("fsdp", "fsdp_config"):
        training.pop(name, None)  # ours: accelerate would shard before the model is attached, and not at all on a CPU
    _check_optimizer(str(training.get("optim", "")))
    if training.get("optim") == _MUON:
        del training["optim"]  # ours
    use_zero(training)
    training.pop("load_best_model_at_end", None)  # ours: the stock check wants save_steps to divide eval_steps
    checkpointing = dict(training.pop("activation_checkpointing_kwargs", None) or {})
    if checkpointing.setdefault("use_reentrant", False):
        raise ThriftyError(
            "gradient_checkpointing_kwargs.use_reentrant must be false: else every layer is differentiated"
        )
    if "every_n_layers" in checkpointing:
        raise ThriftyError(
            "gradient_checkpointing_kwargs.every_n_layers is written checkpoint_layers: the lowest n layers"
        )
    if config.checkpoint_layers and not training.get("activation_checkpointing"):
        raise ThriftyError("checkpoint_layers needs gradient_checkpointing: leave out gradient_checkpointing=false")
    on_cpu = not torch.accelerator.is_available()
    training.setdefault("use_cpu", on_cpu)
    training.setdefault("dataloader_pin_memory", not on_cpu)
    training.setdefault("logging_nan_inf_filter", False)  # a loss that is not finite is an error, not hidden
    training |= {
        "output_dir": config.output_dir,
        "report_to": _trackers(config.report_to),
        "activation_checkpointing_kwargs": checkpointing,
        "include_num_input_tokens_seen": "non_padding",
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "label_names": ["labels"],
        "disable_tqdm": True,
    }
    objective, kind = parse_objective(config.objective), TrainingArguments
    if objective.uses_trl:
        kind, options = trl_arguments(objective, max_length=config.max_length)
        # TRL's own defaults are bfloat16 and checkpointing
        training = {"bf16": False, "activation_checkpointing": False} | training | options
    try:
        args = kind(**training)
    except (ValueError, ImportError) as error:
        raise ThriftyError(f"the training arguments do not fit together: {' '.join(str(error).split())}") from error
    if args.n_gpu > 1:
        raise ThriftyError(
            f"one process sees {args.n_gpu} GPUs: start one process for each (torchrun --nproc-per-node {args.n_gpu} "
            "-m thrifty train ...), or show it one (CUDA_VISIBLE_DEVICES=0)"
        )
    return args


def steps_of(config: RunConfig, method: Method) -> Steps | None:
    """The optimizer that thrifty makes: the one that the run names, else the method's. None for transformers' own."""
    if "optim" in config.training:
        return Muon() if config.training["optim"] == _MUON else None
    return method.steps


def _check_optimizer(name: str) -> None:
    """ThriftyError where `optim` needs a package that is not installed; transformers would say so after the probe."""
    package = None
    if re.fullmatch(r"adamw_torch_[48]bit", name):
        package = "torchao"
    elif re.fullmatch(r"(paged_)?(adamw|lion|ademamix|rmsprop)(_bnb)?(_8bit|_32bit)?", name):
        package = "bitsandbytes"
    if package is not None and find_spec(package) is None:
        raise ThriftyError(
            f"optim: {name} is {package}'s, which is not installed: pip install {package}, or leave out optim"
        )


def schedule_problems(config: RunConfig) -> Iterator[str]:
    """What of the evaluations, checkpoints, order of rows and sharding does not fit together, each with its fix."""
    evaluates = config.training.get("eval_strategy", "no") != "no"
    if config.early_stopping_patience is not None and not evaluates:
        yield "early_stopping_patience needs evaluations while training: give eval_steps (eval_steps=50)"
    if evaluates and not config.data.eval:
        yield "eval_steps needs data.eval: rows to evaluate on"
    if config.packing and config.training.get("train_sampling_strategy") == "sequential":
        yield "train_sampling_strategy: packing decides which rows meet, so sequential needs packing: false"
    if config.training.get("load_best_model_at_end") and not evaluates:
        yield "load_best_model_at_end needs evaluations while training (eval_steps=50)"
    if keeps_best(config) and config.training.get("save_strategy", "steps") == "no":
        yield "load_best_model_at_end needs checkpoints: leave out save_strategy=no"
    yield from sharding_problems(config)
    yield from zero_problems(config)


def _trackers(report_to: Any) -> list[str]:
    wanted = [report_to] if isinstance(report_to, str) else list(report_to or [])
    wanted = [name for name in wanted if name != "none"]
    for name in wanted:
        if name not in _TRACKERS:
            raise ThriftyError(f"report_to: {unknown('tracker', name, ['none', *_TRACKERS])}")
        if find_spec(name) is None:
            raise ThriftyError(f"report_to: {name} is not installed: pip install 'thrifty[report]', or report_to=none")
    return wanted
