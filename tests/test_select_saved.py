"""A mask of sensitive entries, and any plan, used again: on another task, on another model of the same shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_probe import candidates, unit_gradients
from families import batches, build
from tiny_run import configuration, prepare, write_rows

from thrifty import attach
from thrifty.core.errors import ThriftyError
from thrifty.delta import Delta
from thrifty.run.train import train

DATA = batches(2, 4, 9)


def test_the_mask_is_the_most_sensitive_thousandth_of_all_entries() -> None:
    model = build("llama", layers=2)
    units = unit_gradients(model.eval(), DATA)
    plan = attach(build("llama", layers=2), "senszo_mask", batches=DATA).plan
    squares = {n: torch.stack([u[n] for u in units]).square().mean(0) for n in candidates(model)}
    every = torch.cat([s.flatten() for s in squares.values()])
    count = sum(p.numel() for p in model.parameters()) // 1000
    threshold = every.topk(count).values[-1]
    assert plan.trainable_parameters == count
    for name, squared in squares.items():
        mask = plan[name].mask(squared.shape) if name in plan else torch.zeros_like(squared, dtype=torch.bool)
        assert torch.equal(mask, squared >= threshold * (1 - 1e-6)), name


@pytest.mark.parametrize("method", ["senszo_mask", {"smt": {"block_size": 8}}, "bitfit"])
def test_a_plan_is_used_again_on_another_model_of_the_shape(method: Any, tmp_path: Path) -> None:
    budget = None if method == "bitfit" else 0.05
    tuning = attach(build("gpt2", layers=2), method, budget=budget, batches=DATA)
    tuning.delta().save(tmp_path / "delta")
    for folder in (tmp_path, tmp_path / "delta"):
        again = attach(build("gpt2", layers=2, seed=5), {"saved": {"plan": str(folder)}})
        assert dict(again.plan) == dict(tuning.plan)
        assert again.plan.shapes == tuning.plan.shapes
        again.finish()


def test_a_run_reuses_the_plan_of_a_run_on_another_task(tmp_path: Path) -> None:
    prepare(tmp_path)
    first = configuration(tmp_path, max_steps=2, save_steps=2, output_dir=str(tmp_path / "first"))
    train(first)
    write_rows(tmp_path / "train.jsonl", rows=22, seed=9)
    plan = Delta.load(tmp_path / "first" / "delta").plan
    for source in ("first", "first/checkpoint-2"):
        config = first | {"method": {"saved": {"plan": str(tmp_path / source)}}, "budget": None}
        run = train(config | {"output_dir": str(tmp_path / source.replace("/", "-again-") / "again")})
        assert dict(run.delta.plan) == dict(plan)
        assert all((piece.values != piece.original).any() for piece in run.delta.pieces.values())


def test_a_plan_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    chosen = {"random_blocks": {"block_size": 8, "target_modules": ["q_proj"], "scope": "per_matrix"}}
    attach(build("llama", layers=2), chosen, budget=0.05).delta().save(tmp_path / "delta")
    attach(build("llama", layers=1), {"peft": {"r": 1}}).delta().save(tmp_path / "peft")
    saved = {"saved": {"plan": str(tmp_path)}}
    small = build("llama", layers=2)
    small.model.layers[0].self_attn.q_proj = torch.nn.Linear(40, 20, bias=False)
    (tmp_path / "empty").mkdir()
    for model, method, budget, message in (
        (build("llama", layers=1), saved, None, "is of another model: unknown parameter 'model.layers.1"),
        (build("gpt2", layers=2), saved, None, "is of another model: unknown parameter"),
        (small, saved, None, r"is of another model: .* is \(20, 40\) here, \(40, 40\) there"),
        (build("llama", layers=2), saved, 0.01, "remove budget"),
        (small, {"saved": {"plan": str(tmp_path / "empty")}}, None, "holds no plan: give the folder of a finished run"),
        (small, {"saved": {"plan": str(tmp_path / "none")}}, None, "holds no plan"),
        (small, {"saved": {"plan": str(tmp_path / "peft")}}, None, "is an adapter, which chose no places"),
        (small, {"saved": {"plan": 3}}, None, "plan 3 is not valid"),
    ):
        with pytest.raises(ThriftyError, match=message) as error:
            attach(model, method, budget=budget)
        assert "\n" not in str(error.value)


def test_the_delta_of_a_rotated_run_is_refused_for_it_holds_no_basis(tmp_path: Path) -> None:
    attach(build("llama", layers=1), "sparsegrad", batches=DATA).delta().save(tmp_path / "delta")
    for folder in (tmp_path, tmp_path / "delta"):
        with pytest.raises(ThriftyError, match=r"delta of a sparsegrad run.* give a checkpoint of that run") as error:
            attach(build("llama", layers=1), {"saved": {"plan": str(folder)}})
        assert "\n" not in str(error.value)
