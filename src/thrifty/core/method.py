"""Method: how to train, as a frozen composition of parts; and how a user names one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import nn

from . import registry
from .budget import Budget
from .errors import ThriftyError, unknown
from .plan import Plan

__all__ = ["Method", "Part", "Schedule", "Selector", "Steps", "Update", "parse_method"]


class Selector(Protocol):
    """WHERE: `(model, probe, budget) -> Plan`. `statistics` names what it asks of the probe; empty: no probe needed."""

    @property
    def statistics(self) -> frozenset[str]: ...

    @property
    def spends(self) -> bool:
        """Does it choose as much as a budget buys? Otherwise its size is its own, and a budget is only checked."""
        ...

    def check(self, model: nn.Module, budget: Budget | None) -> None:
        """ThriftyError for what is wrong before any gradient is taken."""
        ...

    def grids(self, model: nn.Module, budget: Budget | None) -> Mapping[str, tuple[int, int]]:
        """Parameter name -> the block shape on which the probe reduces its gradient."""
        ...

    def select(self, model: nn.Module, *, probe: Any, budget: Budget | None, seed: int) -> Plan: ...


class Update(Protocol):
    """WHAT is trained there. `kind` is `in_place`, `low_rank` or `peft`."""

    @property
    def kind(self) -> str: ...

    def selector(self, select: Selector) -> Selector:
        """`select` with its regions in the form in which this update trains them."""
        ...


class Steps(Protocol):
    """HOW the leaves move."""

    def optimizer(
        self, leaves: Mapping[str, nn.Parameter], *, learning_rate: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """An optimizer of `leaves`, by parameter name."""
        ...


class Schedule(Protocol):
    """WHEN the plan changes: called around each step of the optimizer that holds the leaves, in any loop.

    It keeps nothing itself. `tuning.step` counts the steps made; what it has to remember goes into `tuning.memory`, by
    name, numbers and tensors, which checkpoints keep. It changes the plan with `tuning.replan` and `tuning.rewind`.
    """

    def before_step(self, tuning: Any) -> None:
        """The gradients are in the leaves; the plan must stay as it is."""
        ...

    def after_step(self, tuning: Any) -> None:
        """The weights hold what the step gave."""
        ...


@dataclass(frozen=True, kw_only=True)
class Part:
    """One select -> update pair. A peer that places its own parts has no selector. `budget`: of this part alone."""

    select: Selector | None
    update: Update
    budget: Budget | None = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """How to train. `options` is what the user wrote, so that `to_dict` gives the YAML form back.

    general: the probe must see general text, not the task; `text` names the plain text file that a run takes it from.
    loss: what the probe differentiates, the `task`'s own loss or the `contrastive` one of its answers.
    steps: the optimizer that suits it; None for AdamW.
    """

    name: str
    parts: tuple[Part, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    schedule: Schedule | None = None
    general: bool = False
    text: str | None = None
    loss: Literal["task", "contrastive"] = "task"
    steps: Steps | None = None

    def to_dict(self) -> dict[str, Any]:
        """The form that `parse_method` and a run file take: `{name: {option: value}}`."""
        return {self.name: dict(self.options)}

    def optimizer(
        self, leaves: Mapping[str, nn.Parameter], *, learning_rate: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """Of `leaves`, by parameter name: its own, or AdamW."""
        if self.steps is not None:
            return self.steps.optimizer(leaves, learning_rate=learning_rate, weight_decay=weight_decay)
        return torch.optim.AdamW(leaves.values(), lr=learning_rate, weight_decay=weight_decay)

    @property
    def needs_probe(self) -> bool:
        return any(part.select is not None and part.select.statistics for part in self.parts)


def parse_method(value: str | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Method) -> Method:
    """A name, `{name: {option: value}}`, a list of `{select, update, budget}` parts (the method `custom`), or a Method.
    ThriftyError names the nearest method or option."""
    if isinstance(value, Method):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = {"custom": {"parts": list(value)}}
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ThriftyError(f"method must be a name or one mapping like {{smt: {{block_size: 64}}}}, not {value!r}")
    (name, options), *_ = value.items()
    record = registry.get(str(name))
    options = dict(options or {}) if isinstance(options, Mapping) or options is None else options
    if not isinstance(options, dict):
        raise ThriftyError(f"options of method {record.name!r} must be a mapping, not {options!r}")
    parameters = inspect.signature(record.build).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in options:
            if key not in parameters:
                raise ThriftyError(unknown(f"option of method {record.name!r}:", str(key), parameters))
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and parameter.kind is parameter.KEYWORD_ONLY and key not in options:
            raise ThriftyError(f"method {record.name!r} needs the option {key!r}: see `thrifty methods {record.name}`")
    try:
        method = record.build(**options)
    except ThriftyError:
        raise
    except (TypeError, AttributeError, ValueError, LookupError, ArithmeticError) as error:
        raise ThriftyError(
            f"method {record.name!r}: an option has a value of the wrong kind ({error}); "
            f"see `thrifty methods {record.name}`"
        ) from error
    return replace(method, name=record.name, options=options)
