"""`fsdp` in a run file: PyTorch's FSDP2 on the attached model. Each process holds a part of weights, gradients and
optimizer state while the run trains.

accelerate is not asked to shard: it would do so after the optimizer has been made, and on a CPU it falls back to data
parallelism without a word. The trainer is told that the model shards itself, and leaves it as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from thrifty.core.errors import ThriftyError, unknown
from thrifty.core.method import parse_method
from thrifty.core.processes import processes
from thrifty.core.rotated import Rotated
from thrifty.objective.heads import unwrapped

from .config import RunConfig

if TYPE_CHECKING:
    from thrifty.update.peer import PeerTuning
    from thrifty.update.tuning import Tuning

    from .trainer import ThriftyTrainer

__all__ = ["Sharding", "parse_sharding", "shard", "sharding_problems", "takes_sharded"]

_RESHARDS = {"full_shard": True, "shard_grad_op": False, "auto_wrap": None}  # transformers' words -> reshard or not
_OPTIONS = ("version", "reshard_after_forward", "transformer_layer_cls_to_wrap", "auto_wrap_policy")
_REFUSED = {
    "cpu_ram_efficient_loading": "each process reads the model itself, to look at its gradients before it is sharded",
    "cpu_offload": "what a process holds stays on its device",
    "activation_checkpointing": "write activation_checkpointing: true outside fsdp_config",
    "state_dict_type": "checkpoints hold the trained values gathered, and resume in any number of processes",
}
_LAUNCHER = {
    "ACCELERATE_USE_FSDP": "write fsdp: true into the run file, and leave FSDP out of accelerate's configuration",
    "ACCELERATE_USE_DEEPSPEED": "write deepspeed into the run file, and leave it out of accelerate's configuration",
}


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How the model is sharded.

    reshard_after_forward: a layer's weights are let go after its forward and gathered again for its backward (ZeRO-3);
        otherwise they stay until the backward is done (ZeRO-2).
    layers: class names of the modules that are gathered one at a time; none for those that the model names.
    """

    reshard_after_forward: bool = True
    layers: tuple[str, ...] = ()


def parse_sharding(training: Mapping[str, Any]) -> Sharding | None:
    """What `fsdp` and `fsdp_config` ask for. ThriftyError for what is not known or cannot be had."""
    asked, config = training.get("fsdp"), training.get("fsdp_config")
    if not asked:
        if config:
            raise ThriftyError("fsdp_config: it needs fsdp: true")
        return None
    options = {str(key).removeprefix("fsdp_"): value for key, value in (config or {}).items()}
    reshards = True
    for word in asked.split() if isinstance(asked, str) else ():
        if word not in _RESHARDS:
            raise ThriftyError(f"fsdp: {unknown('word', word, ['true', *_RESHARDS])}")
        reshards = reshards if _RESHARDS[word] is None else bool(_RESHARDS[word])
    for key, value in options.items():
        if key in _REFUSED and value:
            raise ThriftyError(f"fsdp_config.{key} is not to be set: {_REFUSED[key]}")
        if key not in (*_OPTIONS, *_REFUSED):
            raise ThriftyError(unknown("key", f"fsdp_config.{key}", [f"fsdp_config.{name}" for name in _OPTIONS]))
    if (version := options.get("version", 2)) != 2:
        raise ThriftyError(f"fsdp_config.version must be 2 (fully_shard), not {version!r}")
    if (policy := options.get("auto_wrap_policy", "TRANSFORMER_BASED_WRAP")) != "TRANSFORMER_BASED_WRAP":
        raise ThriftyError(f"fsdp_config.auto_wrap_policy must be TRANSFORMER_BASED_WRAP, not {policy!r}")
    reshards = options.get("reshard_after_forward", reshards)
    if not isinstance(reshards, bool):
        raise ThriftyError(f"fsdp_config.reshard_after_forward must be true or false, not {reshards!r}")
    return Sharding(reshard_after_forward=reshards, layers=_names(options.get("transformer_layer_cls_to_wrap")))


def _names(given: Any) -> tuple[str, ...]:
    given = [given] if isinstance(given, str) else given or []
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ThriftyError(f"fsdp_config.transformer_layer_cls_to_wrap must be a list of class names, not {given!r}")
    return tuple(given)


def sharding_problems(config: RunConfig) -> Iterator[str]:
    """What of `fsdp`, `fsdp_config` and the launcher's settings cannot be had, each with its fix."""
    for variable, fix in _LAUNCHER.items():
        if os.environ.get(variable, "").lower() in ("1", "true"):
            yield f"{variable} is set, and accelerate would shard the model before it is attached: {fix}"
    try:
        sharding = parse_sharding(config.training)
    except ThriftyError as error:
        yield str(error)
        return
    if sharding is None:
        return
    if config.training.get("fp16"):
        yield "fp16 has a loss scale, which is not known to sharded gradients: bf16: true, or leave out fsdp"
    if parse_method(config.method).schedule is not None:
        yield f"fsdp: method {parse_method(config.method).name!r} {_CHANGES}"


_CHANGES = "changes what is trained while it trains, and cannot be sharded: leave out fsdp (DDP)"


def shard(tuning: Tuning | PeerTuning, sharding: Sharding) -> bool:
    """Shard the attached model over all processes, its leaves too: an optimizer is made after this. Whether there was
    anything to share: one process keeps its model."""
    if processes() == 1:
        return False
    if any(isinstance(region, Rotated) for region in tuning.plan.values()):
        raise ThriftyError("fsdp: a rotated matrix (sparsegrad) cannot be sharded: leave out fsdp (DDP)")
    model = tuning.model
    mesh = init_device_mesh(next(model.parameters()).device.type, (processes(),))
    for layer in _layers(model, sharding.layers):
        fully_shard(layer, mesh=mesh, reshard_after_forward=sharding.reshard_after_forward)
    fully_shard(model, mesh=mesh)
    return True


def _layers(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """The modules of these classes, by default those that the model itself says are never split."""
    wanted = names or tuple(getattr(unwrapped(model), "_no_split_modules", None) or ())
    found = [m for m in model.modules() if any(kind.__name__ in wanted for kind in type(m).__mro__)]
    if not found:
        which = f"no module of class {', '.join(wanted)}" if wanted else "no class of layers that it names itself"
        raise ThriftyError(
            f"fsdp: {type(unwrapped(model)).__name__} has {which}: give fsdp_config: "
            "{transformer_layer_cls_to_wrap: [...]}, the class of its layers"
        )
    return found


def takes_sharded(trainer: ThriftyTrainer) -> None:
    """Tell a trainer that its model shards itself: no DDP around it, and gradients travel at the end of a step."""
    model = trainer.model
    assert isinstance(model, FSDPModule)
    trainer.is_distributed_loading_by_transformers = True  # what transformers calls a model that arrives sharded
    model._is_fsdp_managed_module = True  # type: ignore[attr-defined]
    trainer._defer_fsdp_gradient_reduction = partial(_gradients_stay, model)


@contextmanager
def _gradients_stay(model: FSDPModule) -> Iterator[None]:
    """Micro-batches before the last one of a step keep their gradients where they are."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
