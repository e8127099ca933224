"""GreenTrainer: the best set under a ceiling, and what backward then costs."""

from __future__ import annotations

import itertools
import random
import time
from statistics import median

import pytest
import torch
from contract_cells import summed_loss
from families import FAMILIES, VOCAB, batches, build
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from thrifty import attach
from thrifty.core.errors import ThriftyError
from thrifty.schedule.within_flops import WithinFlops
from thrifty.select.flops import Link, backward_chain, chain_flops
from thrifty.select.knapsack import best_under


@pytest.mark.parametrize("seed", range(12))
def test_dynamic_programming_equals_brute_force(seed: int) -> None:
    draw = random.Random(seed)
    chain = [
        Link(name=None if i == 2 else f"t{i}", weight_flops=draw.randrange(6), pass_flops=draw.randrange(6))
        for i in range(9)
    ]
    names = [link.name for link in chain if link.name is not None]
    importance = {name: draw.uniform(-0.3, 1.0) for name in names}
    full = chain_flops(chain, set(names))
    for rho in (0.2, 0.5, 0.8, 1.0):
        sets = (set(s) for n in range(len(names) + 1) for s in itertools.combinations(names, n))
        fitting = (s for s in sets if chain_flops(chain, s) <= rho * full)
        best = max(sum(importance[name] for name in s) for s in fitting)
        # a grid of the FLOPs themselves: nothing is rounded
        found = best_under(chain, importance, ceiling=rho * full, grid=int(full))
        assert chain_flops(chain, found) <= rho * full
        assert sum(importance[name] for name in found) == pytest.approx(best)


def test_a_coarse_grid_never_goes_over_the_ceiling() -> None:
    draw = random.Random(0)
    chain = [Link(name=f"t{i}", weight_flops=draw.random(), pass_flops=draw.random()) for i in range(40)]
    importance = {f"t{i}": draw.random() for i in range(40)}
    full = chain_flops(chain, set(importance))
    for rho in (0.1, 0.3, 0.6, 0.9):
        assert chain_flops(chain, best_under(chain, importance, ceiling=rho * full, grid=50)) <= rho * full


def backward_flops(model: nn.Module) -> int:
    (batch,) = batches(1, 2, 16)
    loss = summed_loss(model, batch)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("rho", [0.35, 0.5, 0.7])
def test_backward_costs_what_was_predicted(family: str, rho: float) -> None:
    """Counted, not timed: the products of a backward pass with the chosen set, over those of the full one."""
    model = build(family, layers=4)
    chain = backward_chain(model)
    everything = {link.name for link in chain if link.name is not None}
    assert everything == {name for name, _ in model.named_parameters()}
    full = backward_flops(build(family, layers=4))
    tuning = attach(model, {"greentrainer": {"rho": rho, "period": 50}})
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-3)
    for i in range(2):
        assert set(tuning.plan) == everything
        (batch,) = batches(1, 2, 16, seed=i)
        optimizer.zero_grad()
        summed_loss(model, batch).backward()
        optimizer.step()
    chosen = set(tuning.plan)
    predicted = chain_flops(chain, chosen) / chain_flops(chain, everything)
    assert 0.6 * rho <= predicted <= rho
    optimizer.zero_grad()
    # what lies beside the chain (q, k and v read one input) and products of activations make the difference
    assert backward_flops(model) / full == pytest.approx(predicted, abs=0.12)


def backward_seconds(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Of this process's CPU, which other programs do not take."""
    model.zero_grad(set_to_none=True)
    loss = summed_loss(model, batch)
    start = time.process_time()
    loss.backward()
    return time.process_time() - start


@pytest.mark.timed
def test_backward_takes_the_share_of_time_that_was_predicted() -> None:
    """Wide enough that products with weights dominate; both measured in turns, never against an absolute time."""
    wide = LlamaConfig(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8
    )
    torch.manual_seed(0)
    full, model = LlamaForCausalLM(wide).train(), LlamaForCausalLM(wide).train()
    (batch,) = batches(1, 4, 128)
    tuning = attach(model, {"greentrainer": {"rho": 0.5, "period": 50}})
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        summed_loss(model, batch).backward()
        optimizer.step()
    chain = backward_chain(full)
    everything = {name for name, _ in full.named_parameters()}
    predicted = chain_flops(chain, set(tuning.plan)) / chain_flops(chain, everything)
    assert 0.3 <= predicted <= 0.5
    rounds = [(backward_seconds(model, batch), backward_seconds(full, batch)) for _ in range(8)][1:]
    chosen, whole = (median(seconds) for seconds in zip(*rounds, strict=True))
    assert chosen / whole == pytest.approx(predicted, abs=0.2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_chain_runs_from_the_head_to_the_embeddings(family: str) -> None:
    model = build(family)
    chain = backward_chain(model)
    names = [link.name for link in chain if link.name is not None]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all("embed" in name or "wte" in name or "wpe" in name for name in names[-1:])
    head = model.get_output_embeddings().weight
    assert chain[0].pass_flops == 2 * head.numel()
    assert all(module.training for module in model.modules())


def test_importance_is_the_negative_product_of_the_update_and_the_next_gradient() -> None:
    model, seen = build("llama", layers=2), {}

    class Watched(WithinFlops):
        def _plan(self, plain, importance):  # type: ignore[no-untyped-def]
            seen.update(importance)
            return super()._plan(plain, importance)

    tuning = attach(model, {"greentrainer": {"period": 9}})
    tuning.schedule = Watched(rho=0.5, period=9)
    optimizer = torch.optim.SGD(tuning.parameters(), lr=1e-2)
    values, gradients = [], []
    for i in range(2):
        (batch,) = batches(1, 2, 8, seed=i)
        optimizer.zero_grad()
        summed_loss(model, batch).backward()
        values.append({n: p.detach().clone() for n, p in model.named_parameters()})
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        optimizer.step()
    for name, value in seen.items():
        change = values[1][name] - values[0][name]
        assert value == pytest.approx(-float((gradients[1][name] * change).sum()), rel=1e-4, abs=1e-7), name
    assert seen.keys() == values[0].keys()


def test_a_share_too_small_for_any_tensor_is_said() -> None:
    tuning = attach(build("llama", layers=2), {"greentrainer": {"rho": 1e-9}})
    optimizer = torch.optim.SGD(tuning.parameters(), lr=1e-3)
    (batch,) = batches(1, 2, 8)
    summed_loss(tuning.model, batch).backward()
    optimizer.step()
    summed_loss(tuning.model, batch).backward()
    with pytest.raises(ThriftyError, match="rho 1e-09 is too little for any tensor of this model: raise rho"):
        optimizer.step()
