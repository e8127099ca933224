"""`torch.compile` of attached models: one graph without breaks, the eager losses and gradients, nothing compiled again.

Backend `aot_eager`: autograd and functionalization as under inductor, without its code generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import batches, build
from torch import Tensor, nn

from thrifty.objective import install, prepare
from thrifty.update.linear import InPlaceConv1D, InPlaceLinear
from thrifty.update.part import InPlaceModule
from thrifty.update.tuning import Tuning, attach

STEPS = 4
DATA = batches(STEPS, rows=2, length=9)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.set_stance("default")


def run(forward: Callable[[int], Tensor], tuning: Tuning, *, compiled: bool) -> list[Tensor]:
    """Losses and leaf gradients of every step; from the second step on, compiling anew is an error."""
    optimizer, found = torch.optim.AdamW(tuning.parameters(), lr=0.02), []
    for n in range(STEPS):
        if compiled and n == 1:
            torch.compiler.set_stance("fail_on_recompile")
        loss = forward(n)
        loss.backward()
        found += [loss.detach(), *(leaf.grad.clone() for leaf in tuning.parameters())]
        optimizer.step()
        optimizer.zero_grad()
    return found


def check(make: Callable[[], tuple[nn.Module, Tuning]], loss: Callable[[Any, int], Tensor]) -> None:
    """Eager and compiled runs of what `make` attaches agree."""
    model, tuning = make()
    eager = run(lambda n: loss(model, n), tuning, compiled=False)
    model, tuning = make()
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled = run(lambda n: loss(whole, n), tuning, compiled=True)
    for expected, got in zip(eager, compiled, strict=True):
        torch.testing.assert_close(got, expected)
    assert all(bool(leaf.any()) for leaf in tuning.parameters())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


CHECKPOINTED = {"use_reentrant": False}
MODELS: dict[str, tuple[str, Any, float | None, dict[str, Any] | None]] = {
    "blocks_8": ("llama", {"smt": {"scope": "per_matrix", "block_size": 8}}, 0.05, CHECKPOINTED),
    "blocks_16_bias": ("qwen2", {"smt": {"scope": "per_matrix", "block_size": 16}}, 0.1, None),
    "columns": ("llama", {"smt": {"scope": "per_matrix", "block_size": "column"}}, 0.05, CHECKPOINTED),
    "rows": ("llama", {"smt": {"scope": "per_matrix", "block_size": "row"}}, 0.05, None),
    "strip_first": (
        "llama",
        {"smt": {"scope": "per_matrix", "block_size": [14, 6], "input_budget": 0.5}},
        0.05,
        CHECKPOINTED,
    ),
    "entries": ("llama", {"random_entries": {}}, 0.02, CHECKPOINTED),
    "many_entries": ("qwen2", {"random_entries": {}}, 0.4, None),  # where sampling costs more than a product
    "conv1d_entries": ("gpt2", {"random_entries": {}}, 0.02, None),
    "conv1d_blocks_8": ("gpt2", {"smt": {"scope": "per_matrix", "block_size": 8}}, 0.05, None),
    "conv1d_columns": ("gpt2", {"smt": {"scope": "per_matrix", "block_size": "column"}}, 0.03, CHECKPOINTED),
    "tied_head": ("gpt2", {"random_blocks": {"target_modules": ["wte"], "block_size": 8}}, 0.05, CHECKPOINTED),
    "experts": ("mixtral", {"random_blocks": {"target_modules": ["gate_up_proj"], "block_size": 16}}, 0.1, None),
    "rotated": ("llama", "sparsegrad", None, CHECKPOINTED),
    "full": ("gpt2", "full", None, CHECKPOINTED),
}
GENERAL = ("tied_head", "experts", "rotated")


@pytest.mark.parametrize("case", MODELS)
def test_a_whole_model(case: str) -> None:
    family, method, budget, checkpointing = MODELS[case]

    def make() -> tuple[nn.Module, Tuning]:
        model = build(family, layers=1)
        model.loss_type = "ForCausalLM"  # transformers warns where it guesses it, and logging breaks the graph
        model.config.use_cache = False
        tuning = attach(model, method, budget=budget, batches=DATA[:1])
        if checkpointing is not None:
            model.activation_checkpointing_enable(checkpointing)
        tuned = {type(module) for module in model.modules() if isinstance(module, InPlaceModule)}
        assert case == "full" or (tuned <= {InPlaceLinear, InPlaceConv1D}) is (case not in GENERAL)
        return model, tuning

    check(make, lambda model, n: model(**DATA[n]).loss)


def test_the_label_only_loss_leaves_the_layers_one_graph() -> None:
    """Which rows have labels is known only at run time: the graph breaks there, and nowhere else."""
    found = []
    for compiled in (False, True):
        model = build("llama", layers=1)
        install(model, prepare(model))
        tuning = attach(model, {"random_blocks": {"block_size": 8}}, budget=0.02)
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
        for batch in DATA:
            optimizer.zero_grad()
            loss = forward(**batch).loss
            loss.backward()
            optimizer.step()
            found.append([loss.detach(), *(leaf.grad.clone() for leaf in tuning.parameters())])
    for expected, got in zip(found[:STEPS], found[STEPS:], strict=True):
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a)
    (reason,) = torch._dynamo.utils.counters["graph_break"]
    assert "aten.nonzero" in reason
