"""No two methods choose the same on one model under one budget, unless a docstring says why.

Rows of the contract's table that are options of one method stand for it once; `saved` repeats a plan, and PEFT's places
are its own. Methods whose plan changes are compared by the plan after its first change: until then composable_sft and
greentrainer train as full does, which their docstrings say.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from contract_cells import LAYERS, LENGTH, METHODS, ROWS, Row
from families import batches, build
from torch import Tensor, nn

import thrifty
from thrifty.core.method import parse_method
from thrifty.core.region import Region
from thrifty.update.tuning import Tuning


def rows_of(family: str) -> dict[str, Row]:
    """By method, its first row for `family`."""
    found: dict[str, Row] = {}
    for row in METHODS.values():
        if row.exact and family in row.families:
            found.setdefault(parse_method(row.method).name, row)
    return found


def plan_of(
    model: nn.Module, method: Any, row: Row, *, budget: float, data: Sequence[Mapping[str, Tensor]]
) -> dict[str, Region]:
    """What is chosen; where the plan changes, what its first change chooses."""
    tuning = thrifty.attach(model, method, budget=budget if row.budget else None, batches=data, seed=1)
    assert isinstance(tuning, Tuning)
    start = tuning.plan
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-3)
    for _ in range(2 if row.scheduled else 0):
        if tuning.plan is start:
            optimizer.zero_grad()
            tuning.model(**data[0]).loss.backward()
            optimizer.step()
    assert (tuning.plan is not start) == row.scheduled
    return dict(tuning.plan)


def alike(plans: Mapping[str, Mapping[str, Region]]) -> list[tuple[str, str]]:
    return [(one, other) for one, other in itertools.combinations(plans, 2) if plans[one] == plans[other]]


def test_no_two_methods_give_the_same_plan() -> None:
    data = batches(2, ROWS, LENGTH)
    plans = {
        name: plan_of(build("gpt2", layers=LAYERS), row.method, row, budget=0.05, data=data)
        for name, row in rows_of("gpt2").items()
    }
    assert plans.keys() == set(thrifty.methods()) - {"peft", "saved"}
    assert not alike(plans)
