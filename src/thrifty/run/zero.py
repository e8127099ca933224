"""`deepspeed` in a run file: ZeRO, stages 1 and 2, around the attached model, through transformers' trainer.

Every process holds all weights, and the optimizer's state of its share of the trained values alone; in stage 2 their
gradients too. Stage 0 shares nothing out: it is DDP. One process trains without.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment
from transformers.training_args import OptimizerNames

from thrifty.core.errors import ThriftyError
from thrifty.core.method import parse_method

from .config import RunConfig
from .objectives import parse_objective

__all__ = ["use_zero", "zero_problems"]

_SHARD = "fsdp: true shards the weights themselves"
_AUTO = {  # what the run file says already
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
_SECTIONS = {
    "optimizer": "optim, learning_rate and weight_decay of the run file name the optimizer",
    "scheduler": "lr_scheduler_type and warmup_steps of the run file name the schedule",
}
_ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")  # of the flat parts that ZeRO cuts values into


def _read(given: Any) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return dict(given)
    try:
        read = json.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ThriftyError(
            f"deepspeed: {given!r} is no JSON file that can be read ({type(error).__name__}): give its path"
        ) from error
    if not isinstance(read, dict):
        raise ThriftyError(f"deepspeed: {given!r} holds a {type(read).__name__}, not an object with DeepSpeed's keys")
    return read


def zero_problems(config: RunConfig) -> Iterator[str]:
    """What of `deepspeed` cannot be had, each with its fix."""
    training = config.training
    if not (given := training.get("deepspeed")):
        return
    try:
        options = _read(given)
    except ThriftyError as error:
        yield str(error)
        return
    yield from _bad_options(options)
    if training.get("fsdp"):
        yield "deepspeed and fsdp exclude each other: leave out deepspeed, and " + _SHARD
    for name in ("fp16", "bf16"):
        if training.get(name):
            yield (
                f"{name}: DeepSpeed would round the trained values themselves: dtype: bfloat16 halves the weights and "
                "keeps these in float32; or fsdp: true"
            )
    if config.nonfinite == "skip":
        yield "nonfinite=skip: DeepSpeed takes its step before a gradient can be looked at: leave out deepspeed (DDP)"
    method = parse_method(config.method)
    if method.schedule is not None:
        yield f"deepspeed: method {method.name!r} changes what is trained while it trains: leave out deepspeed (DDP)"
    if method.steps is not None and "optim" not in training:
        yield f"deepspeed: method {method.name!r} has steps of its own, which ZeRO would cut up: fsdp: true"
    optim = str(training.get("optim", _ELEMENTWISE[0]))
    if optim not in _ELEMENTWISE and optim in ("muon", *OptimizerNames):
        yield f"deepspeed: optim {optim!r} looks at whole tensors, which ZeRO cuts up: {', '.join(_ELEMENTWISE)}"
    if parse_objective(config.objective).uses_trl:
        yield "deepspeed: TRL's objectives are untested with it: leave out deepspeed (DDP)"


def _bad_options(options: Mapping[str, Any]) -> Iterator[str]:
    zero = options.get("zero_optimization") or {}
    if not isinstance(zero, Mapping) or zero.get("stage", 0) not in (0, 1, 2, 3):
        yield "deepspeed.zero_optimization must be a mapping with a stage of 0, 1 or 2"
        return
    if zero.get("stage") == 3:
        yield f"deepspeed.zero_optimization.stage 3 cannot train in place: stage 2; or {_SHARD}"
    if zero.get("compute_grad_norm", True) is not True:
        yield "deepspeed.zero_optimization.compute_grad_norm must stay true: gradients that are not finite show there"
    for name in ("offload_param", "offload_optimizer"):
        place = zero.get(name)
        if place and (not isinstance(place, Mapping) or place.get("device", "none") != "none"):
            yield f"deepspeed.zero_optimization.{name} is not supported: leave it out; {_SHARD}"
    for name, key in _AUTO.items():
        if options.get(name, "auto") != "auto":
            yield f"deepspeed.{name} is set by {key} of the run file: leave it out here, or write auto"
    for name, why in _SECTIONS.items():
        if options.get(name):
            yield f"deepspeed.{name} is not to be set: {why}"
    for name in ("fp16", "bf16", "torch_autocast"):
        enabled = (options.get(name) or {}).get("enabled", False)
        if enabled not in (False, "auto"):
            yield f"deepspeed.{name} is not supported: leave it out; dtype: bfloat16 halves the weights"


def use_zero(training: dict[str, Any]) -> None:
    """Turn `deepspeed` in `training` into what transformers takes; out of it where there is nothing to share out.

    On a CPU this joins the processes (gloo): transformers' arguments name no backend then, and each would be alone.
    """
    options = _read(training.pop("deepspeed", None) or {})
    stage = (options.get("zero_optimization") or {}).get("stage", 0)
    if stage == 0 or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if find_spec("deepspeed") is None:
        raise ThriftyError("deepspeed: it is not installed: pip install deepspeed")
    training["deepspeed"] = {**dict.fromkeys(_AUTO, "auto"), **options}
    if not torch.accelerator.is_available():
        training["use_cpu"] = False  # accelerate takes it to mean DDP
        training["accelerator_config"] = {**(training.get("accelerator_config") or {}), "use_configured_state": True}
        AcceleratorState._reset_state(reset_partial_state=True)
        with patch_environment(ACCELERATE_USE_DEEPSPEED="true"):
            PartialState(backend="gloo")
