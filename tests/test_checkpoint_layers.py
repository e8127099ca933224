"""Activation checkpointing of the lowest layers alone: the same losses, and as much memory as estimated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import batches, build, config
from tiny_run import configuration, prepare, save_checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from thrifty import attach, train
from thrifty.core.budget import Budget
from thrifty.core.errors import ThriftyError
from thrifty.core.method import parse_method
from thrifty.predict.cost import estimate_job
from thrifty.predict.fit import fewest_layers
from thrifty.predict.grow import grow
from thrifty.predict.hardware import find_hardware
from thrifty.predict.job import Job
from thrifty.predict.placing import attach as place
from thrifty.predict.skeleton import build as skeleton
from thrifty.predict.trace import trace
from thrifty.run.config import load_config
from thrifty.run.estimate import job_of
from thrifty.run.memory import saved_bytes
from thrifty.run.trainer import ThriftyTrainer
from thrifty.select.recompute import recompute_first

LAYERS = 4
BLOCKS = {"random_blocks": {"scope": "per_matrix", "block_size": 8}}


def job(layers: int | None, method: Any = BLOCKS, **changes: Any) -> Job:
    given = {"config": config("llama", layers=LAYERS), "budget": Budget(fraction=0.1) if method == BLOCKS else None}
    given |= {"method": parse_method(method), "rows": 2, "length": 16, "padded": False, "checkpointing": True}
    return Job(**{**given, "checkpoint_layers": layers, **changes})


@pytest.mark.parametrize("method", ["smt", "peft"])
def test_losses_are_the_same_for_any_number(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path)
    save_checkpoint(tmp_path / "model", layers=LAYERS)
    methods = {"smt": {"smt": {"block_size": 8}}, "peft": {"peft": {"r": 2}}}
    changes = {"method": methods[method], "max_steps": 4, "logging_steps": 1, "eval": {"loss": False}}
    changes |= {"budget": 0.05} if method == "smt" else {"budget": None}
    flags, real = [], ThriftyTrainer.training_step

    def watched(self: ThriftyTrainer, *args: Any, **kwargs: Any) -> Any:
        flags.append(
            [m.gradient_checkpointing for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        )
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ThriftyTrainer, "training_step", watched)
    losses = []
    for layers in (0, 1, 3, LAYERS, LAYERS + 1, None):
        output = tmp_path / str(layers)
        run = train(configuration(tmp_path, **changes, checkpoint_layers=layers, output_dir=str(output)))
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        losses.append([(line["loss"], line["grad_norm"]) for line in lines if "loss" in line])
        assert all(found == [i < (layers or 0) for i in range(LAYERS)] for found in flags)
        flags.clear()
        assert not any(getattr(m, "gradient_checkpointing", False) for m in run.model.modules())
    assert len(losses[0]) == 4
    assert all(found == losses[0] for found in losses)


@pytest.mark.parametrize("lowest", [0, 2])  # below the lowest trained layer nothing runs again
def test_kept_bytes_fall_layer_by_layer_and_the_estimate_knows(lowest: int) -> None:
    method = {"random_rows": {"target_modules": rf".*layers\.([{lowest}-{LAYERS - 1}])\.mlp.*"}}
    kept, estimated = [], []
    for layers in range(LAYERS + 1):
        one = job(layers, method, budget=Budget(fraction=0.05))
        model = build("llama", layers=LAYERS)
        model.activation_checkpointing_enable({"use_reentrant": False})
        recompute_first(model, layers)
        attach(model, method, budget=0.05, seed=0)
        ran: list[int] = []
        for number, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_pre_hook(lambda *_, number=number, ran=ran: ran.append(number))
        with saved_bytes(model, lambda m: isinstance(m, GradientCheckpointingLayer)) as saved:
            loss = model(**batches(1, 2, 16)[0]).loss
        loss.backward()
        assert ran == [*range(LAYERS), *reversed(range(lowest, min(layers, LAYERS)))]
        kept.append(saved.within)
        attached, _ = place(skeleton(one), one.method, one.budget)
        estimated.append(trace(one, attached, range(LAYERS)).saved)
    for below in range(lowest):
        assert kept[below + 1] == kept[below]
    falls = [a - b for a, b in zip(kept[lowest:], kept[lowest + 1 :])]
    assert min(falls) > 0.5 * max(falls) > 0
    assert estimated[0] > estimated[-1]
    assert sorted(estimated, reverse=True) == estimated


@pytest.mark.parametrize("layers", [1, 3, 5])
@pytest.mark.parametrize("method", [{"peft": {"r": 2}}, "full"], ids=["lora", "full"])
def test_a_few_layers_stand_for_all_to_the_byte(method: Any, layers: int) -> None:
    one = job(layers, method, config=config("llama", layers=6))
    model, _ = place(skeleton(one), one.method, one.budget)
    every, grown = trace(one, model, range(6)), grow(one, model)
    assert grown.work == every.work
    assert grown.saved == every.saved
    held = {segment: sum(kinds.values()) for segment, kinds in every.peaks.items()}
    assert {segment: sum(kinds.values()) for segment, kinds in grown.peaks.items()}.items() <= held.items()
    assert max(sum(kinds.values()) for kinds in grown.peaks.values()) == max(held.values())


@pytest.mark.parametrize("device", ["l4", "cpu"])
def test_the_fewest_layers_that_fit(device: str) -> None:
    hardware, shape = find_hardware(device), {"config": config("llama", layers=3), "rows": 8, "length": 48}
    peaks = [
        estimate_job(job(layers, "full", checkpointing=layers > 0, **shape), hardware).peak_bytes for layers in range(4)
    ]
    assert sorted(peaks, reverse=True) == peaks
    assert peaks[0] > peaks[-1]
    plain = job(None, "full", checkpointing=False, **shape)
    for limit, expected in ((peaks[0], 0), (peaks[1], 1), (peaks[3] - 1, None)):
        assert fewest_layers(plain, hardware, limit) == expected


def test_what_the_run_file_says(tmp_path: Path) -> None:
    prepare(tmp_path)
    found = job_of(load_config(configuration(tmp_path, checkpoint_layers=1)))
    assert [found.recomputes(layer) for layer in range(3)] == [True, False, False]
    assert not any(job_of(load_config(configuration(tmp_path, checkpoint_layers=0))).recomputes(i) for i in range(3))
    with pytest.raises(ThriftyError, match="checkpoint_layers must be 0 or more"):
        load_config(configuration(tmp_path, checkpoint_layers=-1))
    with pytest.raises(ThriftyError, match="checkpoint_layers needs gradient_checkpointing"):
        train(configuration(tmp_path, checkpoint_layers=1, gradient_checkpointing=False))
    kwargs = {"every_n_layers": 2}
    with pytest.raises(ThriftyError, match="every_n_layers is written checkpoint_layers"):
        train(configuration(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs))
