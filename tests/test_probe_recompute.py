"""Layers that run again in backward while the probe looks: the same sums, fewer bytes, and the model as it was."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, batches, build
from tiny_run import configuration, prepare
from torch import Tensor, nn

from thrifty import train
from thrifty.run.memory import saved_bytes
from thrifty.select import probe as probe_room
from thrifty.select.probe import Probe, run_probe
from thrifty.select.recompute import recomputed_layers
from thrifty.select.targets import targets


def probed(model: nn.Module) -> Probe:
    grids = dict.fromkeys(targets(model, "all-linear"), (8, 8))
    return run_probe(model, batches(2, 4, 11), grids=grids, statistics=["abs_grad", "squared_grad"])


@contextmanager
def nothing(_: nn.Module) -> Any:
    yield []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_sums_are_those_without(family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family, layers=3).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    state = [(dict(vars(m)), m.training) for m in model.modules()]
    found = probed(model)
    assert [(dict(vars(m)), m.training) for m in model.modules()] == state
    assert model.config.use_cache
    monkeypatch.setattr(probe_room, "recomputed_layers", nothing)
    plain = probed(model)
    assert found.inputs == plain.inputs
    for statistic, sums in plain.sums.items():
        for name, expected in sums.items():
            torch.testing.assert_close(found.sums[statistic][name], expected, rtol=1e-5, atol=0)


def test_every_second_layer_keeps_its_input_only_and_every_one_where_the_run_says_so() -> None:
    model, batch = build("llama", layers=4).train(), batches(1, 4, 30)[0]

    def kept() -> int:
        with saved_bytes(model, lambda module: module in layers) as saved:
            loss = model(**batch).loss
        loss.backward()
        return saved.within

    model.eval()
    layers = list(model.model.layers)
    plain = kept()
    with recomputed_layers(model) as chosen:
        assert chosen == [layers[0], layers[2]]
        half = kept()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with recomputed_layers(model) as chosen:
        assert chosen == layers
        none = kept()
    assert 0.4 * plain < half < 0.6 * plain
    assert none < 0.1 * plain


def test_dropout_stays_off_where_a_layer_asks_for_its_own_flag() -> None:
    model, seen = build("llama", layers=2).eval(), []
    layer = model.model.layers[0]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(layer.training)
        return x

    layer.self_attn.forward = lambda *args, **kwargs: (forward(kwargs["hidden_states"]), None)
    probed(model)
    assert seen == [False] * 4  # two batches, each forward once more in backward


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = build("llama", layers=2)
    before = [dict(vars(m)) for m in model.modules()]
    with pytest.raises(ZeroDivisionError), recomputed_layers(model):
        raise ZeroDivisionError
    assert [dict(vars(m)) for m in model.modules()] == before
    assert model.config.use_cache


def test_a_run_with_checkpointing_probes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, layers = [], recomputed_layers

    @contextmanager
    def watched(model: nn.Module) -> Any:
        with layers(model) as found:
            chosen.append(len(found))
            yield found

    monkeypatch.setattr(probe_room, "recomputed_layers", watched)
    folder, short = prepare(tmp_path), {"max_steps": 1, "eval": {"loss": False}}
    train(configuration(folder, output_dir=str(tmp_path / "plain"), **short))
    train(configuration(folder, output_dir=str(tmp_path / "all"), activation_checkpointing=True, **short))
    assert chosen == [1, 2]  # of two layers
