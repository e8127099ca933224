"""LocFT-BF: exactly one matrix, on every family."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, batches, build

from thrifty import attach
from thrifty.core.errors import ThriftyError
from thrifty.core.region import Whole

OUTPUTS = {"gpt2": "transformer.h.1.mlp.c_proj.weight", "mixtral": "model.layers.1.mlp.experts.down_proj"}


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_output_matrix_of_the_middle_mlp_trains(family: str) -> None:
    model = build(family)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuning = attach(model, "locft_bf")
    name = OUTPUTS.get(family, "model.layers.1.mlp.down_proj.weight")
    assert dict(tuning.plan) == {name: Whole()}
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    (batch,) = batches(1, 3, 9)
    tuning.model(**batch).loss.backward()
    optimizer.step()
    after = dict(tuning.finish().named_parameters())
    assert [n for n, before in start.items() if not torch.equal(after[n], before)] == [name]


@pytest.mark.parametrize(
    ("family", "module", "name"),
    [
        ("llama", "up_proj", "model.layers.2.mlp.up_proj.weight"),
        ("gpt2", "mlp.c_fc", "transformer.h.2.mlp.c_fc.weight"),
        ("mixtral", "gate_up_proj", "model.layers.2.mlp.experts.gate_up_proj"),
    ],
)
def test_another_matrix_is_named_without_its_bias(family: str, module: str, name: str) -> None:
    assert list(attach(build(family), {"locft_bf": {"layer": -1, "module": module}}).plan) == [name]


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(ThriftyError, match="unknown module 'down_prj'; did you mean 'down_proj'"):
        attach(build("llama"), {"locft_bf": {"module": "down_prj"}})
