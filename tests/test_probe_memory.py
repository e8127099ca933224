"""Whatever the probe collects, beside the weights and a unit's activations it holds less than one layer's gradient."""

from __future__ import annotations

import pytest
import torch
from families import batches, build
from test_probe import LiveBytes
from torch import Tensor

from thrifty.select import entry_sums, input_sums
from thrifty.select import probe as probe_room
from thrifty.select.attributed import mlp_outputs
from thrifty.select.attribution import ATTRIBUTIONS
from thrifty.select.input_sums import COVARIANCE, INPUT_STATISTICS
from thrifty.select.probe import STATISTICS, run_probe
from thrifty.select.targets import targets


@pytest.mark.parametrize("grid", [(1, 1), (8, 8)])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_statistic_of_gradients_holds_one_gradient(
    statistic: str, grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in (probe_room, entry_sums):
        monkeypatch.setattr(room, "_CHUNK", 64)  # small beside these tiny matrices, as 2**20 is beside real ones
    model = build("llama", layers=4)
    chosen = targets(model, "all-linear")
    numbers = {model.get_parameter(name).numel() for name in chosen}
    layer = sum(model.get_parameter(name).nbytes for name in chosen if ".0." in name)
    with LiveBytes(model, numbers) as watch:
        probe = run_probe(model, batches(2, 4, 11), grids=dict.fromkeys(chosen, grid), statistics=[statistic])
    assert watch.seen >= 2 * len(chosen)
    assert 0 < watch.grad_peak <= max(model.get_parameter(name).nbytes for name in chosen)
    kept = sum(sums.nbytes for sums in probe.sums[statistic].values() if isinstance(sums, Tensor))  # others: on disk
    assert kept or grid == (1, 1) or statistic == "accumulated_grad"
    assert watch.peak + kept < layer


@pytest.mark.parametrize("statistic", [*INPUT_STATISTICS, COVARIANCE])
def test_a_statistic_of_inputs_holds_less_than_one_gradient(statistic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (probe_room, entry_sums, input_sums):
        monkeypatch.setattr(room, "_CHUNK", 64)
    model = build("llama", layers=4)
    chosen = targets(model, "all-linear")
    numbers = {model.get_parameter(name).numel() for name in chosen} | {40**2, 72**2}  # of weights and of covariances
    layer = sum(model.get_parameter(name).nbytes for name in chosen if ".0." in name)
    with LiveBytes(model, numbers) as watch:
        probe = run_probe(model, batches(2, 4, 11), grids=dict.fromkeys(chosen, (8, 8)), statistics=[statistic])
        assert watch.grad_peak == watch.seen == 0
        if statistic == COVARIANCE:
            kept = [sums.rows(0, 1) for sums in probe.covariances.values()]
        else:
            kept = [*probe.input_squares.values()]
        assert watch.seen == 0
        torch.ones(40, 40)
        assert watch.seen == 1  # a whole one would have been seen
    assert len(kept) == len(chosen)
    assert sum(values.nbytes for values in kept) < layer


@pytest.mark.parametrize("statistic", ATTRIBUTIONS)
def test_attributions_need_no_gradient_of_a_weight(statistic: str) -> None:
    model = build("llama", layers=4)
    chosen = targets(model, "all-linear")
    layer = sum(model.get_parameter(name).nbytes for name in chosen if ".0." in name)
    grids = dict.fromkeys(mlp_outputs(model), (1, 40))
    with LiveBytes(model, {model.get_parameter(name).numel() for name in chosen}) as watch:
        probe = run_probe(model, batches(2, 4, 11), grids=grids, statistics=[statistic])
    assert watch.grad_peak == 0
    kept = sum(values.nbytes for values in probe.attributions[statistic].values())
    assert watch.peak + kept < layer
