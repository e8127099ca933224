"""`fit` in a method's options: the whole number with which it trains the most numbers within the budget."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from thrifty.core.budget import Budget, distinct_parameters
from thrifty.core.errors import ThriftyError
from thrifty.core.method import parse_method
from thrifty.run.model import ModelName, base_and_deltas, resolve
from thrifty.update.peer import PeftAdapter
from thrifty.update.tuning import attach

__all__ = ["fitted", "with_fits"]

_FIT = re.compile(r"(?:(\d+)\s*\*\s*)?fit\Z")
_LARGEST = 1 << 16


def with_fits(value: Any, size: int) -> Any:
    """`value` with `fit` as `size`, and `2*fit` as twice that, wherever they stand."""
    if isinstance(value, Mapping):
        return {key: with_fits(item, size) for key, item in value.items()}
    if isinstance(value, list):
        return [with_fits(item, size) for item in value]
    match = _FIT.match(value) if isinstance(value, str) else None
    return int(match[1] or 1) * size if match else value


def fitted(method: Any, *, budget: float | int, model: ModelName, trust_remote_code: bool = False) -> int:
    """What `fit` stands for: the size with which `method` trains the most numbers that `budget` allows.

    Counted on a model without weights, or with random ones where a method needs some.
    ThriftyError where no size fits, or where the size changes nothing.
    """
    name, _ = base_and_deltas(model)
    config = AutoConfig.from_pretrained(resolve(name), trust_remote_code=trust_remote_code)

    def empty(device: str) -> nn.Module:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)

    def count(size: int) -> int:
        try:
            return _count(empty("meta"), with_fits(method, size))
        except NotImplementedError:  # PEFT's SHiRA looks for the entries of its masks
            return _count(empty("cpu"), with_fits(method, size))

    return _largest(functools.cache(count), Budget.parse(budget).of(distinct_parameters(empty("meta"))))


def _largest(count: Callable[[int], int], ceiling: int) -> int:
    """The size of the most numbers up to `ceiling`; `count` rises or falls with the size."""
    one, two = count(1), count(2)
    if one == two:
        raise ThriftyError("fit: the option changes nothing in how many numbers are trained")
    if min(one, two) > ceiling and two > one:
        raise ThriftyError(f"fit: the smallest size trains {one:,} numbers, more than the budget's {ceiling:,}")
    if two < one:
        return _bisect(lambda size: count(size) <= ceiling, low=0, high=1)
    # ranks count in proportion: the first guess is nearly always right
    guess = max(1, 1 + (ceiling - one) // (two - one))
    low = guess if count(guess) <= ceiling else 0
    return _bisect(lambda size: count(size) > ceiling, low=low, high=max(low, guess - 1) + 1) - 1


def _bisect(holds: Callable[[int], bool], *, low: int, high: int) -> int:
    """The smallest size above `low` for which `holds`, which stays true once it is; `high` is the first to be tried."""
    while not holds(high):
        if high > _LARGEST:
            raise ThriftyError(f"fit: no size up to {_LARGEST:,} comes within the budget")
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def _count(model: nn.Module, spec: Any) -> int:
    method = parse_method(spec)
    adapter = method.parts[0].update
    if isinstance(adapter, PeftAdapter):
        from peft import get_peft_model

        wrapped = get_peft_model(model, adapter.build())
        return sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    if method.needs_probe:
        raise ThriftyError(f"fit: {method.name} looks at data before it chooses; give it the budget itself")
    return attach(model, method).trainable_parameters
