"""Mixture of experts: what is trained lies in the experts to which the data are routed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from contract_cells import METHODS
from families import batches, build
from torch import Tensor, nn

from thrifty import attach
from thrifty.select.spread import spread_scores
from thrifty.select.targets import targets

LOW, HIGH = range(3, 50), range(50, 97)  # tokens; one half is routed to experts 0 and 1, the other to 2 and 3


def routed(layers: int = 2) -> nn.Module:
    """A Mixtral whose router reads one channel, which nothing but the token decides."""
    model = build("mixtral", layers=layers)
    with torch.no_grad():
        model.model.embed_tokens.weight[:50, 0] = 10
        model.model.embed_tokens.weight[50:, 0] = -10
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.experts.down_proj[:, 0] = 0
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    return model


def rows_of(tokens: range, n: int = 2) -> list[dict[str, Tensor]]:
    made = batches(n, 4, 12)
    for batch in made:
        batch["input_ids"] = tokens[0] + batch["input_ids"] % len(tokens)
        batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["input_ids"])
    return made


def trained_in(plan: Mapping[str, Any], model: nn.Module) -> list[int]:
    """Trained numbers in each of the four experts, over all stacks."""
    found = torch.zeros(4, dtype=torch.int64)
    for name, parameter in model.named_parameters():
        if name in plan and parameter.ndim == 3:
            ones = torch.zeros(parameter.shape)
            region = plan[name]
            region.scatter_(ones, torch.ones(region.packed_shape(parameter.shape)))
            found += ones.sum(dim=(1, 2)).long()
    return found.tolist()


EXPERTS = ["gate_up_proj", "down_proj"]
PER_MATRIX = {"scope": "per_matrix", "target_modules": EXPERTS, "block_size": 8}
CASES: dict[str, Any] = {
    **{scope: {"smt": {**PER_MATRIX, "scope": scope}} for scope in ("global", "per_kind", "per_layer", "per_matrix")},
    "accumulated": {"smt": {**PER_MATRIX, "score": "accumulated_grad"}},
    "columns": {"smt": {**PER_MATRIX, "block_size": "column"}},
    "spread": {"smt": {**PER_MATRIX, "spread": True}},
    "entries": {"senszo_mask": {"target_modules": EXPERTS}},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("tokens", "used"), [(LOW, (0, 1)), (HIGH, (2, 3))], ids=["low", "high"])
def test_what_is_trained_lies_in_the_experts_that_the_data_use(case: str, tokens: range, used: tuple[int, int]) -> None:
    model = routed()
    found = trained_in(attach(model, CASES[case], budget=0.05, batches=rows_of(tokens), seed=0).plan, model)
    assert all(found[expert] > 0 for expert in used)
    assert sum(found) == sum(found[expert] for expert in used)


@pytest.mark.parametrize("spread", [False, True])
def test_an_unused_expert_is_trained_only_where_the_used_ones_are_whole(spread: bool) -> None:
    model, method = routed(layers=1), {"smt": {**PER_MATRIX, "spread": spread}}
    expert = sum(p[0].numel() for p in model.parameters() if p.ndim == 3)
    found = trained_in(attach(model, method, budget=3 * expert, batches=rows_of(HIGH), seed=0).plan, model)
    assert found[2:] == [expert, expert]
    assert sum(found[:2]) > 0.9 * expert


def test_most_tokens_most_blocks_unless_spread() -> None:
    """Three quarters of the tokens come to experts 0 and 1."""
    mixed = [
        low | {"input_ids": torch.cat([low["input_ids"][:, :9], high["input_ids"][:, 9:]], 1)}
        for low, high in zip(rows_of(LOW, 4), rows_of(HIGH, 4), strict=True)
    ]
    found = {}
    for case, budget in (("per_matrix", 0.2), ("spread", 0.2)):
        model = routed()
        found[case] = trained_in(attach(model, CASES[case], budget=budget, batches=mixed, seed=0).plan, model)
    print(found)
    assert 0 < sum(found["per_matrix"][2:]) < sum(found["per_matrix"][:2])
    assert max(found["spread"]) < 1.2 * min(found["spread"])


@pytest.mark.parametrize(
    "name", [name for name, row in METHODS.items() if row.blocks and "input_budget" not in str(row.method)]
)
def test_stacked_experts_are_among_the_targets(name: str) -> None:
    model, row = routed(), METHODS[name]
    ((kind, options),) = row.method.items()
    data = rows_of(LOW) if row.probes else None
    tuning = attach(model, {kind: {**options, "target_modules": EXPERTS}}, budget=row.budget, batches=data, seed=0)
    assert {parameter.ndim for key, parameter in model.named_parameters() if key in tuning.plan} == {3}
    assert set(tuning.plan) <= set(targets(model, EXPERTS))


def test_spread_puts_matrices_without_a_score_last() -> None:
    scores = torch.zeros(3, 2, 4)
    scores[1] = torch.rand(2, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    found = spread_scores(scores, share=0.2)
    assert found[1].min() > found[[0, 2]].max()
    torch.testing.assert_close(found[1], spread_scores(scores[1], share=0.6))
