"""Statistics of what linear layers read: against plain float64 sums over every token that is no padding."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from families import batches, build
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from thrifty import attach
from thrifty.core.errors import ThriftyError
from thrifty.select import input_sums
from thrifty.select.input_sums import COVARIANCE, INPUT_STATISTICS
from thrifty.select.probe import Probe, model_loss, run_probe
from thrifty.select.targets import targets

FAMILIES = ("llama", "qwen2", "gpt2", "gemma2", "granite")


def inputs_of(model: nn.Module, data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """By parameter: float64 `[tokens, inputs]`, padding left out."""
    found: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):

            def hook(_: nn.Module, args: tuple[Any, ...], key: str = f"{name}.weight") -> None:
                found.setdefault(key, []).append(args[0].detach().double())

            hooks.append(module.register_forward_pre_hook(hook))
    model.eval()
    for batch in data:
        with torch.no_grad():
            model(**batch)
    for hook in hooks:
        hook.remove()
    keep = torch.cat([batch["attention_mask"].flatten().bool() for batch in data])
    return {name: torch.cat([x.flatten(0, -2) for x in rows])[keep] for name, rows in found.items()}


@functools.cache
def setup(family: str) -> tuple[nn.Module, list[dict[str, Tensor]], dict[str, Tensor]]:
    model, data = build(family, layers=2), batches(2, 5, 11)
    return model, data, inputs_of(build(family, layers=2), data)


def probed(family: str, *statistics: str) -> Probe:
    model, data, _ = setup(family)
    return run_probe(model, data, grids=dict.fromkeys(targets(model, "all-linear"), (8, 8)), statistics=statistics)


@pytest.mark.parametrize("chunk", [64, 2**20])
@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_those_of_float64(family: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_sums, "_CHUNK", chunk)
    model, data, exact = setup(family)
    assert any((batch["attention_mask"] == 0).any() for batch in data)  # else nothing is left out
    probe = probed(family, "input_norm", COVARIANCE)
    assert probe.input_squares.keys() == probe.covariances.keys() == targets(model, "all-linear").keys()
    for name, squares in probe.input_squares.items():
        x_TI = exact[name]
        torch.testing.assert_close(squares, x_TI.square().sum(0), rtol=1e-5, atol=1e-9)
        expected = x_TI.mT @ x_TI
        found = probe.covariances[name].read()
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=float(1e-6 * expected.abs().max()))
        torch.testing.assert_close(probe.covariances[name].rows(3, 7), found[3:7])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("statistic", INPUT_STATISTICS)
def test_blocks_and_entries_of_the_highest_input_statistic(statistic: str, family: str) -> None:
    model, data, exact = setup(family)
    probe = probed(family, statistic)
    every: list[Tensor] = []
    for name, target in targets(model, "all-linear").items():
        weight, norms = model.get_parameter(name).detach().double(), exact[name].square().sum(0).sqrt()
        of_each = (norms[:, None] if target.transposed else norms).expand(weight.shape)
        of_each = of_each * weight.abs() if statistic == "weight_times_input" else of_each
        every.append(of_each.flatten())
        for h, w in ((8, 8), (5, 40), (1, 1)):
            found = probe.of_inputs(statistic, target, model.get_parameter(name), grid=(h, w))
            expected = [[block.sum() for block in strip.split(w, 1)] for strip in of_each.split(h)]
            torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-8)
    best = torch.cat(every).sort(descending=True).values
    select = {"entries": {"score": statistic}}
    plan = attach(build(family, layers=2), [{"select": select}], budget=0.02, batches=data).plan
    taken = torch.cat(
        [
            values[plan[n].mask(plan.shapes[n]).flatten()]
            for n, values in zip(targets(model, "all-linear"), every, strict=True)
            if n in plan
        ]
    )
    torch.testing.assert_close(taken.sort(descending=True).values, best[: len(taken)], rtol=1e-5, atol=0.0)


def test_columns_by_the_norm_of_their_input() -> None:
    """SMT's second variant: input channels by the size of their activation."""
    _, data, exact = setup("llama")
    method = {"smt": {"score": "input_norm", "block_size": "column", "scope": "global", "target_modules": ["up_proj"]}}
    plan = attach(build("llama", layers=2), method, budget=72 * 9, batches=data).plan
    norms = {name: exact[name].square().sum(0).sqrt() for name in exact if "up_proj" in name}
    best = sorted(((float(n), name, i) for name, of in norms.items() for i, n in enumerate(of)), reverse=True)[:9]
    assert {(name, i[1]) for name, region in plan.items() for i in region.index.tolist()} == {b[1:] for b in best}


def test_sums_of_two_halves_add_up_to_the_whole() -> None:
    """As those of two processes do."""
    model, data, _ = setup("llama")
    grids = dict.fromkeys(targets(model, "all-linear"), (8, 8))
    first, second, whole = (
        run_probe(model, rows, grids=grids, statistics=["input_norm", COVARIANCE])
        for rows in (data[:1], data[1:], data)
    )
    for name in grids:
        together = first.input_squares[name] + second.input_squares[name]
        torch.testing.assert_close(whole.input_squares[name], together, rtol=1e-6, atol=0.0)
        products = [probe.covariances[name].read() for probe in (first, second, whole)]
        torch.testing.assert_close(products[2], products[0] + products[1], rtol=1e-4, atol=1e-4)


def test_gradients_in_the_same_pass_change_nothing() -> None:
    """Also where layers run again in backward: they count once."""
    alone, beside = probed("llama", "input_norm"), probed("llama", "input_norm", "abs_grad")
    gradients = probed("llama", "abs_grad")
    assert not alone.sums
    for name, squares in alone.input_squares.items():
        assert torch.equal(squares, beside.input_squares[name])
        assert torch.equal(gradients.sums["abs_grad"][name], beside.sums["abs_grad"][name])


def test_inputs_alone_need_no_backward() -> None:
    model, data, _ = setup("llama")

    def loss(m: nn.Module, batch: Any) -> Tensor:
        value = m(**batch).loss
        assert not value.requires_grad
        return value

    name = "model.layers.0.mlp.up_proj.weight"
    assert run_probe(model, data, grids={name: (8, 8)}, statistics=["input_norm"], loss=loss).units == 3


@pytest.mark.parametrize("kind", ["blocks", "entries"])
def test_what_has_no_input_of_its_own_is_named(kind: str) -> None:
    select = {kind: {"score": "weight_times_input"}}
    with pytest.raises(ThriftyError, match=r"what .*experts.* reads is not seen: .*leave it out of target_modules"):
        attach(build("mixtral", layers=1), [{"select": select}], budget=0.1, batches=batches(1, 2, 8))
    select[kind]["target_modules"] = ["q_proj"]
    attach(build("mixtral", layers=1), [{"select": select}], budget=0.01, batches=batches(1, 2, 8))


def test_a_wrong_name_has_a_nearest_one() -> None:
    with pytest.raises(ThriftyError, match="unknown score 'weight_times_inputs'; did you mean 'weight_times_input'"):
        attach(build("llama", layers=1), {"smt": {"score": "weight_times_inputs"}}, batches=batches(1, 2, 8))


def test_products_are_float32_under_autocast() -> None:
    """Of what the layers read there, which autocast has rounded here and there."""
    model, data, exact = setup("llama")

    def loss(plain: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model_loss(plain, batch)

    name = "model.layers.0.self_attn.q_proj.weight"  # reads a norm of the embeddings, which stays in float32
    probe = run_probe(model, data, grids={name: (8, 8)}, statistics=[COVARIANCE], loss=loss)
    torch.testing.assert_close(
        probe.covariances[name].read().double(), exact[name].mT @ exact[name], rtol=1e-4, atol=1e-4
    )
