"""A model without values: built from its configuration, cut to few layers, and made of fake CPU tensors to run it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..core.errors import ThriftyError
from ..update.quantize import check_quantize, packed_bytes
from .job import Job

__all__ = ["build", "cut", "fake", "layers_of", "quiet", "tensors_of", "weight_bytes"]


def build(job: Job) -> PreTrainedModel:
    """The whole model on the meta device, in training mode. ThriftyError where it is no causal language model."""
    config = copy.deepcopy(job.config)
    config.use_cache = False
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=job.dtype, trust_remote_code=job.trust_remote_code
            )
    except ValueError as error:
        raise ThriftyError(f"model: {' '.join(str(error).split())[:300]}") from error
    return model.train()


def layers_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the model's layers in a list, and under which name."""
    found = [
        (len(child), parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and child and isinstance(child[0], GradientCheckpointingLayer)
    ]
    if not found:
        raise ThriftyError(
            f"{type(model).__name__} is not made of transformers' layers: its cost cannot be told without running it"
        )
    _, parent, name = max(found, key=lambda item: item[0])
    return parent, name


def weight_bytes(model: nn.Module, *, quantize: str | None = None) -> int:
    """Of all distinct parameters and buffers; `quantize`: once a run has quantized them so. ThriftyError where it
    cannot."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    total = sum(t.nbytes for t in tensors.values())
    linears = [] if quantize is None else check_quantize(model, quantize)
    return total - sum(linear.weight.nbytes - packed_bytes(linear, str(quantize)) for linear in linears)


def cut(model: nn.Module, numbers: Sequence[int]) -> nn.Module:
    """A copy of `model` with the layers `numbers` alone, in this order; a number may stand twice."""
    parent, name = layers_of(model)
    every = getattr(parent, name)
    alone = nn.ModuleList([every[number] for number in dict.fromkeys(numbers)])
    setattr(parent, name, alone)
    try:
        copied = copy.deepcopy(model)
    finally:
        setattr(parent, name, every)
    place = {number: position for position, number in enumerate(dict.fromkeys(numbers))}
    home, name = layers_of(copied)
    kept = getattr(home, name)
    seen: set[int] = set()
    made = []
    for number in numbers:
        layer = kept[place[number]]
        made.append(copy.deepcopy(layer) if number in seen else layer)
        seen.add(number)
    setattr(home, name, nn.ModuleList(made))
    _set_depth(copied, numbers)
    return copied


def _set_depth(model: nn.Module, numbers: Sequence[int]) -> None:
    """Configurations of the copy say how many layers there are, and of which types."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in configs.values():
        texts: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
        for one in {id(config): config, id(texts): texts}.values():
            if hasattr(one, "num_hidden_layers"):
                one.num_hidden_layers = len(numbers)
            if isinstance(types := getattr(one, "layer_types", None), list) and len(types) > max(numbers):
                one.layer_types = [types[number] for number in numbers]


def fake(model: nn.Module) -> list[Tensor]:
    """Inside a FakeTensorMode: replace every parameter and buffer of `model` by a fake tensor on the CPU, tied ones by
    the same. Returns what is held all the time."""
    made: dict[int, Tensor] = {}

    def one(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[id(tensor)] = new
        return made[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None:
                    held[key] = one(tensor)  # type: ignore[assignment]
        for part in getattr(module, "_thrifty", {}).values():
            for key, own in tensors_of(part).items():
                if own.device.type == "meta":
                    setattr(part, key, one(own))
    return list(made.values())


def tensors_of(part: Any) -> dict[str, Tensor]:
    """What a part holds beside its leaf and its weight: original values, subspaces."""
    return {key: value for key, value in vars(part).items() if isinstance(value, Tensor)}


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of libraries about a model that has no values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
