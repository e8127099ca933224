"""Which matrices read the same input: seen on any model, by identity, with nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, batches, build
from torch import Tensor, nn

from thrifty import attach
from thrifty.core.errors import ThriftyError
from thrifty.select import Input, kept_inputs, run_probe, same_inputs
from thrifty.select.inputs import watch_inputs
from thrifty.select.targets import targets

LLAMA = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
EXPECTED = {
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "mixtral": LLAMA[:2],  # stacked experts keep their whole input in any case
}


def ends(inputs: tuple[Input, ...]) -> list[list[str]]:
    return [[t.name.split(".")[-2] for t in one.matrices] for one in inputs]


@pytest.mark.parametrize("family", FAMILIES)
def test_q_k_v_and_gate_up_read_the_same_input(family: str) -> None:
    model = build(family, layers=2)
    probe = run_probe(
        model, batches(1, 4, 9), grids=dict.fromkeys(targets(model, "all-linear"), (8, 8)), statistics=["abs_grad"]
    )
    assert ends(probe.inputs) == 2 * EXPECTED.get(family, LLAMA)
    for one in probe.inputs:
        assert len({t.name.split(".")[2] for t in one.matrices}) == 1  # of one layer
        assert {t.transposed for t in one.matrices} == {family == "gpt2"}
        assert one.columns == {"down_proj": 72}.get(one.matrices[0].name.split(".")[-2], one.columns)
        assert {t.out_in[1] for t in one.matrices} == {one.columns}
    if family != "mixtral":  # in a mixture of experts the router of this version is no candidate either
        assert {t.name for one in probe.inputs for t in one.matrices} == set(targets(model, "all-linear"))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_forward_on_the_models_own_dummy_inputs_sees_the_same(family: str) -> None:
    model = build(family, layers=2)
    model.model.layers[0].eval() if hasattr(model, "model") else None
    training = [m.training for m in model.modules()]
    names = targets(model, "all-linear")
    probe = run_probe(model, batches(1, 4, 9), grids=dict.fromkeys(names, (8, 8)), statistics=["abs_grad"])
    assert same_inputs(model, names) == same_inputs(model, names, batch=batches(1, 2, 5)[0]) == probe.inputs
    assert [m.training for m in model.modules()] == training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_does_not_change_what_is_seen(reentrant: bool) -> None:
    model = build("llama", layers=2)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls: list[int] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    with watch_inputs(model, targets(model, "all-linear")) as inputs:
        for batch in batches(2, 2, 7):
            model.train()(**batch).loss.backward()
    assert len(calls) == 4  # each forward was run again
    assert ends(inputs()) == 2 * LLAMA


def test_the_head_and_tied_weights_have_no_strips() -> None:
    model = build("gemma2", layers=1)
    names = [n for n, _ in model.named_parameters()]
    assert ends(same_inputs(model, names)) == LLAMA
    untied = build("llama", layers=1)
    assert ends(same_inputs(untied, [n for n, _ in untied.named_parameters()])) == LLAMA  # TRL reads lm_head directly
    untied.model.layers[0].mlp.up_proj.weight = untied.model.layers[0].mlp.gate_proj.weight
    assert ends(same_inputs(untied, [n for n, _ in untied.named_parameters()])) == [*LLAMA[:2], ["down_proj"]]


class Layers(nn.Module):
    """Five layers and a `run` that a test writes."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        for name in "abcde":
            setattr(self, name, nn.Linear(6, 6, bias=False))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def seen(run: Any) -> list[str]:
    model = Layers(run)
    inputs = same_inputs(model, [f"{name}.weight" for name in "abcde"], batch={"x": torch.randn(2, 6)})
    return ["".join(t.name[0] for t in one.matrices) for one in inputs]


def test_only_the_same_unmodified_tensor_is_the_same_input() -> None:
    assert seen(lambda m, x: m.a(x) + m.c(input=x) + m.b(x.clone()) + m.e(x[:])) == ["ac", "b", "d", "e"]
    assert seen(lambda m, x: m.a(x) + m.b(x.mul_(2)) + m.c(x)) == ["a", "bc", "d", "e"]
    assert seen(lambda m, x: m.a(x) + m.b(x) + m.c(m.b(x)) + m.d(m.c(x)) + m.e(x)) == ["abce", "d"]


def test_groups_that_meet_in_a_module_are_one() -> None:
    assert seen(lambda m, x: (y := x + 1, m.d(y) + m.b(y) + m.e(x) + m.b(x))[1]) == ["a", "bde", "c"]


def test_an_address_used_again_is_another_input() -> None:
    addresses: list[int] = []

    def fresh(x: Tensor) -> Tensor:
        y = x + 1
        addresses.append(id(y))
        return y

    def run(m: Layers, x: Tensor) -> Tensor:
        out = x
        for _ in range(20):
            for layer in (m.a, m.b, m.c, m.d, m.e):
                layer(fresh(x))
        return out

    assert seen(run) == list("abcde")
    assert len(set(addresses)) < len(addresses)


def test_a_model_without_dummy_inputs_is_told_so() -> None:
    with pytest.raises(ThriftyError, match="Layers has none: remove input_budget, or take smt"):
        same_inputs(Layers(None), ["a.weight"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block_size", [7, "column", "row", [9, 5]])
def test_kept_inputs_is_the_union_of_the_masks(block_size: Any, family: str) -> None:
    model = build(family, layers=2)
    inputs = same_inputs(model, targets(model, "all-linear"))
    plan = attach(model, {"random_blocks": {"block_size": block_size}}, budget=0.05).plan
    kept = 0
    for one in inputs:
        union = torch.zeros(one.columns, dtype=torch.bool)
        for t in one.matrices:
            if t.name in plan:
                union |= plan[t.name].mask(t.shape).any(1 if t.transposed else 0)
        kept += int(union.sum())
    assert kept > 0
    assert kept_inputs(plan, inputs) == (kept, sum(one.columns for one in inputs))
    whole = attach(build(family, layers=2), "full").plan
    assert len(set(kept_inputs(whole, inputs))) == 1
