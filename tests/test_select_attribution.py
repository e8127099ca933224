"""LoKI's rows: attribution against a plain loop, exactly a quota of every layer, the lowest; general text in a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batches, build
from tiny_run import configuration, prepare
from torch import Tensor, nn

from thrifty import attach
from thrifty.core.budget import Budget
from thrifty.core.errors import ThriftyError
from thrifty.run import train as train_room
from thrifty.run.train import train
from thrifty.select.attributed import mlp_outputs
from thrifty.select.attribution import attribute
from thrifty.select.probe import run_probe

FAMILIES = ("llama", "gpt2", "gemma2", "granite", "mixtral")
WRITERS = {"gpt2": "transformer.h.{}.mlp.c_proj.weight", "mixtral": "model.layers.{}.mlp.experts.down_proj"}
DATA = batches(2, 4, 9)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_writes_the_output_of_an_mlp_is_found(family: str) -> None:
    name = WRITERS.get(family, "model.layers.{}.mlp.down_proj.weight")
    assert list(mlp_outputs(build(family))) == [name.format(i) for i in range(3)]
    assert list(mlp_outputs(build(family), layers="1:")) == [name.format(i) for i in (1, 2)]


def test_a_model_without_an_mlp_says_so() -> None:
    with pytest.raises(ThriftyError, match="no matrix of ModuleDict is seen to write an MLP's output: name them"):
        mlp_outputs(nn.ModuleDict({"attn": nn.Linear(4, 4)}))


def logit_with(model: nn.Module, row: dict[str, Tensor], put: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The answer's logit with outputs replaced at its position, and the outputs there."""
    t, seen, hooks = int((row["labels"][0] != -100).nonzero()[-1]), {}, []
    for name in mlp_outputs(model):

        def hook(_: nn.Module, __: Any, out: Tensor, name: str = name) -> Tensor:
            out = out.clone()
            flat = out.view(-1, out.shape[-1])
            seen[name] = flat[t - 1].detach().clone()
            if name in put:
                flat[t - 1] = put[name]
            return out

        hooks.append(model.get_submodule(name.rpartition(".")[0]).register_forward_hook(hook))
    logits = model(input_ids=row["input_ids"], attention_mask=row["attention_mask"]).logits
    for handle in hooks:
        handle.remove()
    return logits[0, t - 1, row["labels"][0, t]], seen


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_attribution_is_the_sum_along_the_path(family: str, joint: bool) -> None:
    dtype = torch.float32 if family == "mixtral" else torch.float64  # its grouped product has no float64
    model = build(family, dtype, layers=2).eval()
    names = [*mlp_outputs(model)]
    found = attribute(model, DATA[0], names, joint=joint, steps=3)
    for i in range(4):
        row = {k: v[i : i + 1] for k, v in DATA[0].items()}
        _, clean = logit_with(model, row, {})
        for group in [names] if joint else [[n] for n in names]:
            total = {n: torch.zeros_like(clean[n]) for n in group}
            for step in (1, 2, 3):
                points = {n: (clean[n] * step / 3).requires_grad_() for n in group}
                gradients = torch.autograd.grad(logit_with(model, row, points)[0], [*points.values()])
                for n, g in zip(group, gradients, strict=True):
                    total[n] += g
            for n in group:
                torch.testing.assert_close(found[n][i], (clean[n] * total[n] / 3).float(), rtol=1e-3, atol=1e-5)


def test_attributions_add_up_to_what_the_outputs_change() -> None:
    model = build("llama", torch.float64, layers=2).eval()
    (name, *_) = mlp_outputs(model)
    found = attribute(model, DATA[0], [name], joint=False, steps=400)[name]
    for i in range(4):
        row = {k: v[i : i + 1] for k, v in DATA[0].items()}
        with torch.no_grad():
            with_it, clean = logit_with(model, row, {})
            without, _ = logit_with(model, row, {name: torch.zeros_like(clean[name])})
        assert float(found[i].sum()) == pytest.approx(float(with_it - without), rel=0.02, abs=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quota", [0.1, "30%"])
def test_every_layer_has_exactly_its_quota_of_rows_and_they_are_lowest(family: str, quota: float | str) -> None:
    model = build(family, layers=2)
    names = mlp_outputs(model)
    probe = run_probe(model, DATA, grids=dict.fromkeys(names, (1, 1)), statistics=["attribution"])
    plan = attach(build(family, layers=2), {"loki": {"quota": quota}}, batches=DATA).plan
    count = 4 if quota == 0.1 else 12
    assert list(plan) == list(names)
    for name, target in names.items():
        mask = plan[name].mask(target.shape)
        rows = (mask.mT if target.transposed else mask).flatten(0, -3) if mask.ndim == 3 else mask
        if mask.ndim == 2:
            rows = (mask.mT if target.transposed else mask)[None]
        assert torch.equal(rows.any(-1), rows.all(-1))
        assert (rows.any(-1).sum(-1) == count).all()
        assert (rows == rows[0]).all()
        values = probe.attributions["attribution"][name]
        assert values.shape == (8, 40)
        lists = [set(row.argsort()[:count].tolist()) for row in values]
        often = [sum(i in low for low in lists) for i in range(40)]
        chosen = rows[0].any(-1)
        assert min(often[i] for i in range(40) if chosen[i]) >= max(often[i] for i in range(40) if not chosen[i])
        assert values[:, chosen].mean() < values[:, ~chosen].mean()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_budget_buys_the_same_share_of_every_layer(family: str) -> None:
    for budget in (0.01, 0.05, 1.0):
        model = build(family, layers=3)
        plan = attach(model, "loki", budget=budget, batches=DATA).plan
        ceiling = Budget.parse(budget).numbers(build(family, layers=3))
        row = max(plan.sizes.values()) // max(1, min(plan.sizes.values()))
        assert row == 1
        assert plan.trainable_parameters <= ceiling
        assert len(plan) == 3


@pytest.mark.parametrize(
    ("options", "budget", "message"),
    [
        ({"quota": 0.01}, None, "quota buys no row of each of 2 matrices: raise quota to at least 2.5%"),
        ({}, 100, "budget buys no row of each of 2 matrices: raise budget to at least 145"),
        ({"quota": 2}, None, "quota 2 is not a share"),
        ({"quota": 0.5}, 100, "quota 0.5 trains .* more than budget 100 numbers allows"),
        ({"layers": 4}, None, "layer 4 lies outside the model"),
        ({"target_modules": ["down_prj"]}, None, "unknown module 'down_prj'; did you mean 'down_proj'"),
    ],
)
def test_what_cannot_be_chosen_is_refused(options: dict[str, Any], budget: Any, message: str) -> None:
    with pytest.raises(ThriftyError, match=message) as error:
        attach(build("llama", layers=2), {"loki": options}, budget=budget, batches=DATA)
    assert "\n" not in str(error.value)


def test_the_smallest_budget_named_is_enough() -> None:
    assert attach(build("llama", layers=2), "loki", budget=145, batches=DATA).plan.trainable_parameters == 144


def test_what_cannot_be_looked_at_is_refused() -> None:
    masked = [DATA[0] | {"labels": torch.full_like(DATA[0]["labels"], -100)}]
    bare = [{k: v for k, v in DATA[0].items() if k != "labels"}]
    for data, message in (
        (None, "pass batches=.* of general text"),
        ([], "the probe saw no label"),
        (masked, "every label is -100"),
        (bare, "needs batches with 'labels'"),
    ):
        with pytest.raises(ThriftyError, match=message):
            attach(build("llama", layers=1), "loki", budget=0.1, batches=data)
    model = build("llama", layers=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(ThriftyError, match=r"the attribution of .*down_proj.weight is not finite: the model overflows"):
        attach(model, "loki", budget=0.1, batches=DATA)


def test_a_first_label_that_nothing_predicts_is_no_answer() -> None:
    labels = torch.full_like(DATA[0]["labels"], -100)
    labels[:, 0] = 5
    labels[1, 3] = 7
    model = build("llama", layers=1).eval()
    (name,) = mlp_outputs(model)
    assert attribute(model, DATA[0] | {"labels": labels}, [name], joint=False)[name].shape == (1, 40)


def general_run(folder: Path, **changes: Any) -> dict[str, Any]:
    prepare(folder)
    (folder / "general.txt").write_text("the sum of 2 and 3 is 5. " * 40, encoding="utf-8")
    method = {"loki": {"text": str(folder / "general.txt"), "quota": 0.1}}
    return configuration(folder, **{"method": method, "budget": None, "max_steps": 2} | changes)


def test_a_run_takes_the_statistics_from_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = general_run(tmp_path)
    seen: list[Any] = []
    real = train_room.attach_with

    def spied(*args: Any, **options: Any) -> Any:
        seen.extend(batches_ := list(options["batches"]))
        return real(*args, **options | {"batches": batches_})

    monkeypatch.setattr(train_room, "attach_with", spied)
    train(config)
    assert len(seen) == 2  # probe_units
    assert {tuple(batch["input_ids"].shape) for batch in seen} == {(4, 48)}
    for batch in seen:  # every token is a label, padding is none
        there = batch["attention_mask"].bool()
        assert torch.equal(batch["labels"], batch["input_ids"].where(there, -100))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["trainable_parameters"] == 2 * 4 * 72


@pytest.mark.parametrize("method", ["loki", "senszo_mask"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "takes its statistics from general text: give a plain text file, method: "),
        ("none.txt", "there is no file 'none.txt'"),
        ("{}/general.txt", "is also eval.forgetting"),
    ],
)
def test_a_run_without_a_text_of_its_own_is_refused(
    method: str, text: str | None, message: str, tmp_path: Path
) -> None:
    config = general_run(tmp_path, method={method: {} if text is None else {"text": text.format(tmp_path)}})
    config["eval"] = {"forgetting": str(tmp_path / "general.txt")}
    with pytest.raises(ThriftyError, match=message):
        train(config)
    assert not (tmp_path / "out").exists()
