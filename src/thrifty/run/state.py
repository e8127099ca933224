"""Optimizer, scheduler and random states in safetensors + JSON: exact to the bit, and nothing is ever unpickled."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from thrifty.core.errors import ThriftyError
from thrifty.update.sharded import cut_as, whole

__all__ = [
    "load_optimizer_state",
    "load_scheduler_state",
    "load_state",
    "optimizer_state",
    "random_state",
    "save_state",
    "set_random_state",
]

_OF_GROUPS = {"base_lrs", "_last_lr", "lr_lambdas"}  # of a scheduler's state: one for each group of parameters


# Tensors of few bits that an optimizer keeps -> their module, so that nothing else is imported for a checkpoint.
_FEW_BITS = {f"OptimState{kind}": f"torchao.optim.subclass_{kind.lower()}" for kind in ("4bit", "8bit", "Fp8")}


def _encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    kind = type(value).__name__
    if type(value) in (Tensor, nn.Parameter):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if type(value).__module__ == _FEW_BITS.get(kind):
        names, rest = value.__tensor_flatten__()
        inner = {name: getattr(value, name) for name in names}
        return {"few_bits": [_encode(item, tensors, where) for item in (kind, inner, list(rest))]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.Size):
        value = tuple(value)
    if isinstance(value, Mapping):
        return {"dict": [[key, _encode(item, tensors, f"{where}.{key}")] for key, item in value.items()]}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_encode(item, tensors, where) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ThriftyError(
        f"{where} holds a {type(value).__name__}, which a checkpoint cannot keep without pickle; "
        "choose another optim or lr_scheduler_type, or save_strategy=no"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content].clone()  # the file's own mapping must not outlive the checkpoint
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    if kind == "dtype":
        return getattr(torch, content)
    items = [_decode(item, tensors) for item in content]
    if kind == "few_bits":
        name, inner, rest = items
        return getattr(import_module(_FEW_BITS[name]), name).__tensor_unflatten__(inner, rest)
    return tuple(items) if kind == "tuple" else items


def save_state(stem: Path, value: Any) -> None:
    """Write nested dicts, lists, tuples, tensors and scalars as `<stem>.json` and `<stem>.safetensors`."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(value, tensors, stem.name))
    places: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in places:  # a table that several states share; safetensors writes none twice
            tensors[name] = tensor.clone()
        places.add(tensor.data_ptr())
    if tensors:
        save_file(tensors, stem.with_suffix(".safetensors"))
    stem.with_suffix(".json").write_text(text, encoding="utf-8")


def load_state(stem: Path) -> Any:
    """What `save_state` wrote, on the CPU."""
    file = stem.with_suffix(".safetensors")
    tensors = load_file(file) if file.exists() else {}
    return _decode(json.loads(stem.with_suffix(".json").read_text(encoding="utf-8")), tensors)


def _names(optimizer: torch.optim.Optimizer, leaves: Mapping[str, nn.Parameter]) -> list[str]:
    """The leaf name of each parameter, in the order in which the optimizer's own state numbers them."""
    by_id = {id(leaf): name for name, leaf in leaves.items()}
    return [by_id[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_state(optimizer: torch.optim.Optimizer, leaves: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """`optimizer.state_dict()` with the state kept under the leaves' names, which outlive a change of their order.

    What the processes hold in parts is gathered: all of them call this.
    """
    state = optimizer.state_dict()
    names = _names(optimizer, leaves)
    by_name = {
        names[number]: {key: whole(value) if isinstance(value, Tensor) else value for key, value in entry.items()}
        for number, entry in state["state"].items()
    }
    groups = [group | {"params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    return state | {"state": by_name, "param_groups": groups}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], leaves: Mapping[str, nn.Parameter]
) -> None:
    """Put back what `optimizer_state` returned. ThriftyError where the trained leaves are others."""
    names = _names(optimizer, leaves)
    number = {name: index for index, name in enumerate(names)}
    groups, first = [], 0
    filled = iter([group for group in state["param_groups"] if group["params"]])  # DeepSpeed drops the others
    for current in optimizer.param_groups:
        saved = next(filled) if current["params"] else current
        here = names[first : first + len(current["params"])]
        if other := sorted(set(here) ^ set(saved["params"])):
            raise ThriftyError(
                f"the checkpoint's optimizer holds other tensors: {other[0]!r} is not in both; "
                "resume with the run's own configuration"
            )
        # torch matches by position within the group, so the order is the current one.
        groups.append(saved | {"params": [number[name] for name in here]})
        first += len(here)
    by_number = {
        number[name]: {k: cut_as(v, leaves[name]) if isinstance(v, Tensor) else v for k, v in entry.items()}
        for name, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": by_number, "param_groups": groups})


def load_scheduler_state(scheduler: Any, state: Mapping[str, Any]) -> None:
    """Put a scheduler's state back; where the run was given more steps, the next one has the new schedule's rate."""
    groups = len(scheduler.optimizer.param_groups)  # each with the rate of the others
    each = {key: (state[key] * groups)[:groups] for key in _OF_GROUPS & state.keys()}
    scheduler.load_state_dict({**state, **each})
    if isinstance(scheduler, LambdaLR):
        pairs = zip(scheduler.lr_lambdas, scheduler.base_lrs, strict=True)
        scheduler._last_lr = [base * at(scheduler.last_epoch) for at, base in pairs]
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):  # as some optimizers keep it
                group["lr"].fill_(float(rate))
            else:
                group["lr"] = rate


def random_state() -> dict[str, Any]:
    """This process's Python, NumPy, torch and device generators."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
