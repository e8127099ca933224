"""Invariant 6, for every method of the contract's table: what cannot train is an error that says what to do."""

from __future__ import annotations

import pytest
import torch
from contract_cells import LENGTH, METHODS, ROWS, Cell
from families import batches, build

from thrifty import attach
from thrifty.core.errors import ThriftyError


@pytest.mark.parametrize("name", METHODS)
def test_6_what_cannot_train_is_an_error_that_says_what_to_do(name: str) -> None:
    cell, (batch,) = Cell(name, METHODS[name].families[0], "float32"), batches(1, ROWS, LENGTH)
    masked = batch | {"labels": torch.full_like(batch["labels"], -100)}
    tuning = cell.attach(cell.build())
    leaves = "|".join(tuning.named_leaves())
    with pytest.raises(ThriftyError, match=f"got no gradient in the first step, first ({leaves}):"):
        tuning.check_gradients()
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    cell.backward(tuning.model, masked, 1)
    tuning.check_gradients()
    optimizer.step()
    with pytest.raises(ThriftyError, match=r"no trained value moved in the first step: .*labels"):
        tuning.check_changed()
    cell.backward(tuning.model, batch, 1)
    optimizer.step()
    tuning.check_changed()
    if cell.row.probes:
        with pytest.raises(ThriftyError, match="every label is -100; check the data"):
            attach(cell.build(), cell.row.method, budget=cell.row.budget, batches=[masked])


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if not row.entries])
def test_6_a_budget_that_buys_nothing_changes_nothing(name: str) -> None:
    cell = Cell(name, METHODS[name].families[0], "float32")
    model = cell.build()
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ThriftyError, match=r"raise budget to at least \d+|more than budget 2 numbers") as error:
        attach(model, cell.row.method, budget=2, batches=batches(1, ROWS, LENGTH))
    assert "\n" not in str(error.value)
    assert [type(m) for m in model.modules()] == kinds
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n][0])
        assert p.requires_grad == before[n][1]


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.blocks])
def test_6_a_selector_that_matches_nothing_names_the_nearest(name: str) -> None:
    ((method, options),) = METHODS[name].method.items()
    with pytest.raises(ThriftyError, match="'q_prj'; did you mean 'q_proj'"):
        attach(build("llama"), {method: options | {"target_modules": ["q_prj"]}}, batches=batches(1, ROWS, LENGTH))
