"""What a method would train, looked up among the names and shapes of a model without values."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from thrifty.core.budget import Budget, distinct_parameters
from thrifty.core.errors import ThriftyError
from thrifty.core.method import Method, Selector, parse_method
from thrifty.select.compose import budgets
from thrifty.update.peer import PeftAdapter, may_rewrite_base

from ..config import RunConfig
from .report import Report

__all__ = ["check_places"]

_NAMED = 8  # kinds of modules that are listed
_ALL = Budget(fraction=0.01)  # what selectors take where no budget is given


def check_places(report: Report, config: RunConfig, model: PreTrainedModel) -> int | None:
    """What each part of the method matches. How many numbers are trained, at most; None where that cannot be told."""
    method = parse_method(config.method)
    adapter = method.parts[0].update
    if isinstance(adapter, PeftAdapter):
        return _peer(report, config, model, adapter)
    try:
        chosen = budgets(method, model, config.budget)
    except ThriftyError as error:
        report.problem(f"method: {error}")
        return None
    parts: list[tuple[str, _Part]] = []
    for number, (select, budget) in enumerate(chosen, 1):
        name = method.name if len(chosen) == 1 else f"part {number}"
        try:
            select.check(model, budget)
            parts.append((name, _matched(select, budget, model)))
        except ThriftyError as error:
            report.problem(f"method: {f'{name}: ' if len(chosen) > 1 else ''}{error}")
            continue
        report.say(f"{name}: {parts[-1][1].text}")
    _check_apart(report, parts)
    total, trained = distinct_parameters(model), sum(part.trained for _, part in parts)
    if trained:
        report.say(f"at most {trained:,} of {total:,} numbers are trained ({100 * trained / total:.3g}%)")
    _say_probe(report, config, method)
    return trained or None


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What a part matches, in words and by name. trained: how many numbers at most; all_of_it: those of all names."""

    text: str
    names: frozenset[str]
    trained: int
    all_of_it: bool = False


def _check_apart(report: Report, parts: Sequence[tuple[str, _Part]]) -> None:
    """No tensor may be in two parts."""
    for (one, first), (other, second) in itertools.combinations(parts, 2):
        shared = sorted(first.names & second.names)
        if not shared:
            continue
        fix = "give them different target_modules or layers"
        if first.all_of_it and second.all_of_it:
            report.problem(f"method: {one} and {other} both train {shared[0]}: {fix}")
        else:
            report.warn(f"method: {one} and {other} may both choose {shared[0]}, which would stop the run: {fix}")


def _matched(select: Selector, budget: Budget | None, model: PreTrainedModel) -> _Part:
    grids = select.grids(model, budget)
    if not grids:
        plan = select.select(model, probe=None, budget=budget, seed=0)
        size = plan.trainable_parameters
        if select.spends:  # a schedule chooses among these
            size = min(size, (budget or _ALL).numbers(model))
        text = f"{len(plan)} tensor{'s' * (len(plan) > 1)} ({_kinds(plan)}), {plan.trainable_parameters:,} numbers"
        return _Part(text=text, names=frozenset(plan), trained=size, all_of_it=not select.spends)
    parameters = dict(model.named_parameters())
    held = sum(parameters[name].numel() for name in grids)
    allowed = min(held, (budget or _ALL).numbers(model))
    units = Counter(grids.values())
    if not select.spends:
        text = f"a share of {len(grids)} matrices ({_kinds(grids)}), {held:,} numbers"
        return _Part(text=text, names=frozenset(grids), trained=held)
    text = f"chooses in {len(grids)} matrices ({_kinds(grids)}), {held:,} numbers; "
    text += f"budget {budget or _ALL} is {allowed:,} numbers"
    (shape, _), *others = units.most_common()
    if shape != (1, 1) and not others:
        text += f", up to {allowed // math.prod(shape):,} blocks of {shape[0]} x {shape[1]}"
    return _Part(text=text, names=frozenset(grids), trained=allowed)


def _kinds(names: Iterable[str]) -> str:
    """`q_proj 30, k_proj 30`: the modules that hold them."""
    found = Counter(".".join(name.split(".")[-2:-1]) or name for name in names)
    listed = [f"{kind} {count}" for kind, count in found.most_common(_NAMED)]
    return ", ".join(listed) + (", ..." if len(found) > _NAMED else "")


def _say_probe(report: Report, config: RunConfig, method: Method) -> None:
    if method.needs_probe:
        units, rows = config.probe_units, config.probe_rows
        report.say(f"chosen by the gradients of {units * rows} rows ({units} units of {rows}) before the first step")


def _peer(report: Report, config: RunConfig, model: PreTrainedModel, adapter: PeftAdapter) -> int | None:
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    total = distinct_parameters(model)
    try:
        with torch.device("meta"):
            wrapped: Any = get_peft_model(copy.deepcopy(model), adapter.build())
    except (ValueError, TypeError) as error:
        report.problem(f"method: PEFT refuses this {adapter.peft_type} configuration: {' '.join(str(error).split())}")
        return None
    except NotImplementedError:  # it starts from the values of the weights
        report.say(f"{adapter.peft_type}: what it adds is seen only when the weights are there")
        return None
    if may_rewrite_base(adapter.build()):
        report.warn("method: an init_* option of PEFT that changes base weights is refused: try it with --step")
    leaves = [p for p in wrapped.parameters() if p.requires_grad]
    trained = sum(p.numel() for p in leaves)
    layers = [name for name, module in wrapped.named_modules() if isinstance(module, BaseTunerLayer)]
    where = f" in {_kinds(f'{name}.weight' for name in layers)}" if layers else ""
    report.say(f"{adapter.peft_type}: {len(leaves)} tensors{where}")
    report.say(f"{trained:,} numbers are trained, beside {total:,} ({100 * trained / total:.3g}%)")
    if config.budget is not None and trained > 1.05 * config.budget.of(total):
        report.problem(
            f"budget: the PEFT configuration trains {trained:,} numbers, more than budget {config.budget} "
            f"({config.budget.of(total):,}) allows: lower its rank, or remove budget"
        )
    return trained
