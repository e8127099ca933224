"""In a run the probe sees the precision that training has, whether the Trainer has the model already or not."""

from __future__ import annotations

from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from families import batches, build
from tiny_run import configuration, prepare

from thrifty.objective.next_token import install, loss_of
from thrifty.objective.proof import prepare as prove
from thrifty.run.probe_batches import probe_loss
from thrifty.run.train import train
from thrifty.update.scheduled import ScheduledTuning


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_the_plan_stays_where_the_weights_do(
    precision: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps too small to move a weight: the plan made before the Trainer is the one made inside it."""
    prepare(tmp_path)
    plans, choose = list[Any](), ScheduledTuning.choose

    def noting(self: ScheduledTuning, *given: Any, **named: Any) -> Any:
        plan = choose(self, *given, **named)
        plans.append((dict(self.plan), dict(plan)))
        return plan

    monkeypatch.setattr(ScheduledTuning, "choose", noting)
    part = {"select": {"entries": {"score": "squared_grad"}}}
    changes = {"method": {"custom": {"parts": [part], "reselect_every": 1}}, "learning_rate": 1e-30, "max_steps": 2}
    train(configuration(tmp_path, **changes, **precision))
    assert len(plans) == 2
    for before, after in plans:
        assert before == after


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_loss_is_the_same_before_and_after_autocast_is_put_on(precision: str) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    args: Any = SimpleNamespace(device=torch.device("cpu"), bf16=precision == "bf16", fp16=precision == "fp16")
    model, (batch,) = build("llama"), batches(1, 2, 9)
    install(model, prove(model, sample_batch=batch))
    plain, before = loss_of(model, batch), probe_loss(args)(model, batch)
    assert torch.equal(before, plain) == (precision == "fp16")
    model._original_forward = model.forward  # as accelerate does
    model.forward = prepared = MethodType(torch.autocast("cpu", dtype=dtype)(model.forward.__func__), model)
    assert not torch.equal(loss_of(model, batch), plain)
    assert torch.equal(probe_loss(args)(model, batch), before)
    assert model.forward is prepared
