"""The probe shared out over processes: any number of them sums up to the same statistics, and chooses the same plan."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, build
from safetensors.torch import load_file, save_file
from tiny_run import start
from torch import Tensor, distributed

import thrifty
from thrifty.core.errors import ThriftyError
from thrifty.select.probe import Probe, run_probe
from thrifty.select.targets import targets

METHODS: list[Any] = [
    {"smt": {"block_size": 8}},
    {"smt": {"block_size": "column", "input_budget": 0.3, "scope": "per_matrix"}},
    {"smt": {"score": "accumulated_grad", "block_size": 4}},
    "gps",
    "sparsegrad",
]
STATISTICS = ["abs_grad", "accumulated_grad", "squared_grad", "input_norm", "input_covariance", "side_moments"]


def batches(units: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCAB, (2, 12), generator=draw) for _ in range(units)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]


def look(units: int) -> tuple[Probe, list[str]]:
    """The sums of a probe, and the digests of the plans of all methods."""
    model = build("llama").double()
    grids = dict.fromkeys(targets(model, "all-linear"), (4, 4))
    probe = run_probe(model, batches(units), grids=grids, statistics=STATISTICS, rows=2)
    digests = []
    for method in METHODS:
        tuning = thrifty.attach(model, method, budget=0.05, batches=batches(units))
        digests.append(tuning.plan.digest())
        tuning.finish()
    return probe, digests


def numbers(probe: Probe) -> dict[str, Tensor]:
    found = {}
    for statistic, sums in probe.sums.items():
        found |= {f"{statistic} {n}": s if isinstance(s, Tensor) else s.read() for n, s in sums.items()}
    found |= {f"squares {n}": s for n, s in probe.input_squares.items()}
    found |= {f"products {n}": s.read() for n, s in probe.covariances.items()}
    return found | {f"sides {n}": s.columns.read() for n, s in probe.sides.items()}


def join(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)


def _look(rank: int, world: int, port: int, units: int, folder: Path) -> None:
    join(rank, world, port)
    probe, digests = look(units)
    save_file({name: value.contiguous() for name, value in numbers(probe).items()}, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps([probe.units, digests]))
    distributed.destroy_process_group()


def _fail(rank: int, world: int, port: int, folder: Path) -> None:
    join(rank, world, port)
    model, seen = build("llama"), []

    def loss(model: Any, batch: Any) -> Tensor:
        seen.append(1)
        if rank == 1:
            raise RuntimeError("out of memory on this one")
        value: Tensor = model(**batch).loss
        return value

    try:
        grids = {"model.layers.0.mlp.up_proj.weight": (4, 4)}
        run_probe(model, batches(4), grids=grids, statistics=["abs_grad"], loss=loss)
    except (RuntimeError, ThriftyError) as error:
        (folder / f"{rank}.txt").write_text(str(error))
    distributed.destroy_process_group()


def together(target: Any, world: int, *arguments: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(target, rank, world, port, *arguments) for rank in range(world)]
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * world


@pytest.mark.parametrize(("world", "units"), [(2, 5), (3, 2)])
def test_any_number_of_processes_sees_the_same(world: int, units: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    probe, digests = look(units)
    together(_look, world, units, tmp_path)
    expected = numbers(probe)
    for rank in range(world):
        seen, plans = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen == units
        assert plans[:-1] == digests[:-1]
        assert plans == json.loads((tmp_path / "0.json").read_text())[1]  # sparsegrad's holds what was rounded
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=2e-6, atol=1e-6 * float(value.abs().max()), msg=name)


def test_what_fails_in_one_process_ends_the_others(tmp_path: Path) -> None:
    together(_fail, 2, tmp_path)
    assert (tmp_path / "1.txt").read_text() == "out of memory on this one"
    assert "another process failed while it looked at its part of the batches" in (tmp_path / "0.txt").read_text()
