"""GPS by the supervised contrastive loss: against plain loops in float64; what it needs of the data."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dense_probe import candidates
from families import batches, build
from torch import Tensor, nn

from thrifty import attach
from thrifty.core.errors import ThriftyError
from thrifty.select.contrastive import TEMPERATURE, contrastive_loss, supervised_contrastive

ANSWERS = [[7, 8], [9], [7, 8], [9], [5, 6, 4], [9], [7, 8], [9]]


def rows(answers: list[list[int]], *, seed: int = 0) -> dict[str, Tensor]:
    """Prompts of different length, each with its answer behind it; padded right."""
    draw = torch.Generator().manual_seed(seed)
    made = {key: torch.full((len(answers), 12), filler) for key, filler in (("input_ids", 0), ("labels", -100))}
    made["attention_mask"] = torch.zeros(len(answers), 12, dtype=torch.long)
    for i, answer in enumerate(answers):
        length = int(torch.randint(4, 9, (1,), generator=draw))
        made["input_ids"][i, :length] = torch.randint(10, 97, (length,), generator=draw)
        made["input_ids"][i, length : length + len(answer)] = torch.tensor(answer)
        made["labels"][i, length : length + len(answer)] = torch.tensor(answer)
        made["attention_mask"][i, : length + len(answer)] = 1
    return made


def plain(features: list[Tensor], classes: list[Any]) -> Tensor:
    """The loss in loops, from its definition."""
    z, losses = [f / f.norm() for f in features], []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        positives = [j for j in others if classes[j] == classes[i]]
        if positives:
            below = sum(torch.exp(z[i] @ z[a] / TEMPERATURE) for a in others)
            losses.append(
                -sum(torch.log(torch.exp(z[i] @ z[p] / TEMPERATURE) / below) for p in positives) / len(positives)
            )
    return sum(losses) / len(losses)


def features_of(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    first = [(labels != -100).nonzero()[0, 0] for labels in batch["labels"]]
    return [hidden[at - 1] for hidden, at in zip(out.hidden_states[-1], first, strict=True)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_loss_and_gradients_are_those_of_plain_loops(family: str) -> None:
    model, batch = build(family, layers=2).double().eval(), rows(ANSWERS)
    found = contrastive_loss(model, batch)
    expected = plain(features_of(model, batch), [tuple(answer) for answer in ANSWERS])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0.0)
    names = [*candidates(model)]
    weights = [model.get_parameter(name) for name in names]
    pairs = zip(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights), strict=True)
    for name, (ours, theirs) in zip(names, pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-14, msg=name)


def test_what_follows_the_prompt_does_not_matter() -> None:
    """The feature must not see the answer: else rows would be told apart by what they are to be told apart for."""
    model, batch = build("llama", layers=2).eval(), rows(ANSWERS)
    other = batch | {"input_ids": torch.where(batch["labels"] == -100, batch["input_ids"], 50)}
    torch.testing.assert_close(contrastive_loss(model, other), contrastive_loss(model, batch))


def test_classes_without_a_second_row_count_as_others_only() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(5, 8, generator=draw, dtype=torch.float64)
    classes = torch.tensor([0, 1, 0, 2, 0])
    expected = plain([*features], classes.tolist())
    torch.testing.assert_close(supervised_contrastive(features, classes), expected)
    alone = supervised_contrastive(features.requires_grad_(), torch.arange(5))
    alone.backward()
    assert alone.item() == 0.0
    assert not features.grad.any()
    one = supervised_contrastive(torch.ones(2, 8), torch.zeros(2, dtype=torch.long))
    assert math.isclose(float(one), 0.0, abs_tol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_plan_is_of_k_in_each_row_and_another_than_by_the_task(family: str) -> None:
    data = [rows(ANSWERS, seed=seed) for seed in range(2)]
    plans = {}
    for loss in ("task", "contrastive"):
        model = build(family, layers=2)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        tuning = attach(model, {"gps": {"per_row": 2, "loss": loss}}, batches=data)
        plans[loss] = tuning.plan
        for name, transposed in candidates(build(family, layers=2)).items():
            mask = tuning.plan[name].mask(tuning.plan.shapes[name])
            assert ((mask.mT if transposed else mask).sum(-1) == 2).all()
        optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2)
        tuning.model(**data[0]).loss.backward()
        optimizer.step()
        assert all(torch.equal(p, before[n]) for n, p in tuning.finish().named_parameters() if n not in tuning.plan)
    shared = sum(
        int((r.mask(plans["task"].shapes[n]) & plans["task"][n].mask(plans["task"].shapes[n])).sum())
        for n, r in plans["contrastive"].items()
    )
    assert shared < 0.7 * plans["task"].trainable_parameters


def test_what_is_chosen_has_the_largest_gradient_of_the_contrastive_loss() -> None:
    batch = rows(ANSWERS[:4])
    plan = attach(build("llama", layers=1), {"gps": {"per_row": 1, "loss": "contrastive"}}, batches=[batch]).plan
    model = build("llama", layers=1).eval()
    contrastive_loss(model, batch).backward()
    for name, region in plan.items():
        gradient = model.get_parameter(name).grad.abs()
        best = gradient.amax(1)
        torch.testing.assert_close(gradient[region.mask(gradient.shape)], best, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        (
            {},
            [rows([[5], [6], [7], [8], [5]])],
            "no two of the 4 rows that are looked at together have the same answer",
        ),
        ({}, batches(2, 4, 9), "no two of the 4 rows"),
        ({}, [], "no two of the 4 rows"),
        ({}, None, "looks at gradients first"),
        ({"loss": "contrastiv"}, batches(1, 4, 9), "unknown loss 'contrastiv'; did you mean 'contrastive'"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, Any], data: Any, message: str) -> None:
    with pytest.raises(ThriftyError, match=message) as error:
        attach(build("llama", layers=1), {"gps": {"loss": "contrastive", **options}}, budget=0.05, batches=data)
    assert "\n" not in str(error.value)


def test_a_model_without_a_head_is_named() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(ThriftyError, match="needs a language model with an output head, Linear has none"):
        contrastive_loss(model, rows(ANSWERS))


def test_units_without_an_answer_are_not_looked_at() -> None:
    blank = rows(ANSWERS[:4])
    blank["labels"].fill_(-100)
    blank["labels"][1, 0] = 5  # the first token, which nothing predicts
    plans: list[dict[str, Any]] = []
    seen: list[int] = []
    for data in ([rows(ANSWERS)], [blank, rows(ANSWERS), blank]):
        model = build("llama", layers=1)
        hook = model.register_forward_pre_hook(
            lambda _m, _a, inputs: seen.append(len(inputs["input_ids"])), with_kwargs=True
        )
        plans.append(dict(attach(model, {"gps": {"per_row": 1, "loss": "contrastive"}}, batches=data).plan))
        hook.remove()
    assert seen == [4, 4, 4, 4]
    assert plans[0] == plans[1]
