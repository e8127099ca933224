"""The chosen blocks are the top ones of plain dense autograd, and do not depend on how rows are batched."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import pytest
import torch
from dense_probe import block_scores, candidates, greedy, unit_gradients
from families import batches, build
from torch import Tensor

from thrifty import attach
from thrifty.core.plan import Plan, kind_of

SCORES = ("abs_grad", "accumulated_grad", "signed_grad", "squared_grad", "weight_times_grad")
FAMILIES = ("llama", "gpt2", "mixtral")


@functools.cache
def setup(family: str) -> tuple:
    """A model, ten rows in units of 4, 4 and 2, and their dense gradients."""
    model, data = build(family, layers=2), batches(2, 5, 11)
    return model, data, unit_gradients(model, data)


def chosen(plan: Plan) -> dict[str, set[tuple[int, ...]]]:
    return {name: {tuple(i) for i in region.index.tolist()} for name, region in plan.items()}


def plan_of(family: str, data: list[Mapping[str, Tensor]], *, budget: float | int = 0.05, **options: object) -> Plan:
    return attach(build(family, layers=2), {"smt": {"scope": "global"} | options}, budget=budget, batches=data).plan


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("score", SCORES)
def test_the_chosen_blocks_are_the_top_of_dense_autograd(score: str, family: str) -> None:
    model, data, units = setup(family)
    blocks = block_scores(model, units, score=score, size=(8, 8), names=candidates(model))
    plan = plan_of(family, data, score=score, block_size=8)
    expected = greedy(blocks, int(0.05 * sum(p.numel() for p in model.parameters())))
    assert chosen(plan) == expected
    assert sum(map(len, expected.values())) > 20


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("block_size", "size"), [("column", (10**6, 1)), ("row", (1, 10**6)), ([6, 14], (6, 14))])
def test_columns_rows_and_rectangles_are_outputs_by_inputs(
    block_size: object, size: tuple[int, int], family: str
) -> None:
    model, data, units = setup(family)
    blocks = block_scores(model, units, score="abs_grad", size=size, names=candidates(model))
    plan = plan_of(family, data, block_size=block_size)
    assert chosen(plan) == greedy(blocks, int(0.05 * sum(p.numel() for p in model.parameters())))


@pytest.mark.parametrize("family", FAMILIES)
def test_per_kind_gives_each_kind_its_share_by_size(family: str) -> None:
    model, data, units = setup(family)
    names = candidates(model)
    blocks = block_scores(model, units, score="abs_grad", size=(4, 4), names=names)
    ceiling = int(0.05 * sum(p.numel() for p in model.parameters()))
    total = sum(block[1] for block in blocks)
    expected: dict[str, set[tuple[int, ...]]] = {}
    for kind in ("attention", "mlp", "other"):
        of_kind = [block for block in blocks if kind_of(block[2]) == kind]
        expected |= greedy(of_kind, ceiling * sum(block[1] for block in of_kind) // total)
    assert {kind_of(name) for name in expected} == {"attention", "mlp"}
    assert chosen(plan_of(family, data, scope="per_kind", block_size=4)) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_per_matrix_takes_the_best_of_every_matrix_in_proportion(family: str) -> None:
    model, data, units = setup(family)
    names = candidates(model)
    plan = plan_of(family, data, budget=0.1, scope="per_matrix", block_size=4)
    blocks = block_scores(model, units, score="abs_grad", size=(4, 4), names=names)
    ceiling = int(0.1 * sum(p.numel() for p in model.parameters()))
    total = sum(block[1] for block in blocks)
    assert set(plan) == set(names)
    for name, region in plan.items():
        own = sorted((block for block in blocks if block[2] == name), reverse=True)
        n = len(region.index)
        assert {tuple(i) for i in region.index.tolist()} == {block[3] for block in own[:n]}, name
        share = ceiling * sum(block[1] for block in own) / total
        assert abs(plan.sizes[name] - share) <= 16 * (1 + (share < 16)), name  # a block more or less
    assert 0.9 * ceiling <= plan.trainable_parameters <= ceiling


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("block_size", "size"), [("column", (10**6, 1)), ("row", (1, 10**6))])
def test_per_matrix_gives_every_matrix_its_best_columns_or_rows(
    block_size: str, size: tuple[int, int], family: str
) -> None:
    model, data, units = setup(family)
    names = candidates(model)
    plan = plan_of(family, data, budget=0.1, scope="per_matrix", block_size=block_size)
    blocks = block_scores(model, units, score="abs_grad", size=size, names=names)
    assert set(plan) == set(names)
    for name, region in plan.items():
        own = sorted((block for block in blocks if block[2] == name), reverse=True)
        assert {tuple(i) for i in region.index.tolist()} == {block[3] for block in own[: len(region.index)]}, name
    assert 0.9 * 0.1 <= plan.trainable_share <= 0.1


@pytest.mark.parametrize("score", SCORES)
def test_the_plan_does_not_depend_on_how_rows_are_batched(score: str) -> None:
    _, data, _ = setup("llama")
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for batch in data for i in range(5)]
    wide = {k: torch.cat([row[k] for row in rows]) for k in rows[0]}
    lengths = wide["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > 2
    # one row at a time, trimmed; all at once, padded on the left by different amounts
    trimmed = [{k: v[:, :n] for k, v in row.items()} for row, n in zip(rows, lengths, strict=True)]
    left = {k: torch.full((10, 15), -100 if k == "labels" else 0) for k in wide}
    for k, v in wide.items():
        for i, n in enumerate(lengths):
            left[k][i, 15 - n :] = v[i, :n]
    plans = [plan_of("llama", d, score=score, block_size=8) for d in (data, trimmed, rows, [wide], [left])]
    assert all(chosen(plan) == chosen(plans[0]) for plan in plans)


def test_other_data_give_another_plan() -> None:
    _, data, _ = setup("llama")
    assert chosen(plan_of("llama", data, block_size=8)) != chosen(plan_of("llama", data[:1], block_size=8))


def test_a_unit_without_a_label_counts_for_nothing() -> None:
    _, data, _ = setup("llama")
    rows = {k: v[:4] for k, v in data[0].items()}
    masked = rows | {"labels": torch.full_like(rows["labels"], -100)}
    assert chosen(plan_of("llama", [rows, masked], block_size=8)) == chosen(plan_of("llama", [rows], block_size=8))
