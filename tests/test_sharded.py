"""DDP and FSDP2 in place: any number of processes trains what one does with the same global batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import VOCAB, build
from safetensors.torch import load_file, save_file
from test_probe_processes import join, together
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import thrifty
from thrifty.core.errors import ThriftyError
from thrifty.update.sharded import is_sharded

STEPS, PARTS, ROWS, LENGTH = 20, 2, 4, 12
METHODS: dict[str, Any] = {
    "smt": {"smt": {"block_size": 8}},
    "gps": "gps",
    "rows": [{"select": {"blocks": {"block_size": "row", "target_modules": ["embed_tokens"]}}}],
    "axes": "gradient_axes",
    "columns": "muon_columns",
    "full": "full",
    "pairs": [{"select": {"weights": {"target_modules": ["q_proj"]}}, "update": {"low_rank": {"r": 2}}}],
}


def rows(number: int) -> Tensor:
    return torch.randint(3, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(number))


def probed() -> list[dict[str, Tensor]]:
    """One unit: shared out, single numbers' sums would round otherwise."""
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in (rows(90),)]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def sent(state, bucket):  # type: ignore[no-untyped-def]
    """DDP's own exchange, its bytes counted."""
    state.append(bucket.buffer().nbytes)
    done = distributed.all_reduce(bucket.buffer().div_(distributed.get_world_size()), async_op=True).get_future()
    return done.then(lambda future: future.value()[0])


def trained(name: str, how: str, *, dtype: torch.dtype, start: dict[str, Tensor] | None = None) -> tuple[Any, ...]:
    """Losses of `STEPS` steps of the global batch, the tuning, and the bytes that a step sent (DDP)."""
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    rank = distributed.get_rank() if world > 1 else 0
    torch.manual_seed(0)
    model = build("llama").to(dtype)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    tuning = thrifty.attach(
        model, METHODS[name], budget=0.05 if name not in ("full", "pairs") else None, batches=probed()
    )
    run, bytes_sent = model, list[int]()
    if how == "ddp":
        run = DistributedDataParallel(model)
        run.register_comm_hook(bytes_sent, sent)
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(is_sharded(leaf) for leaf in tuning.parameters())
    if start is not None:
        tuning.load_state(start)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for part in range(PARTS):
            share = ROWS // world
            loss = loss_of(run, rows(2 * step + part)[rank * share : (rank + 1) * share]) / PARTS
            loss.backward()
            if how == "fsdp":  # nothing but the leaves: no dense gradient travels
                leaves = {id(leaf) for leaf in tuning.parameters()}
                assert all(p.requires_grad == (id(p) in leaves) for p in model.parameters())
            total += loss.detach().double()
        if world > 1:
            distributed.all_reduce(total)
        losses.append(total.item() / world)
        optimizer.step()
        optimizer.zero_grad()
    return losses, tuning, sum(bytes_sent) / (STEPS * PARTS)


def outcome(name: str, how: str, *, dtype: torch.dtype) -> dict[str, Tensor]:
    losses, tuning, sent_bytes = trained(name, how, dtype=dtype)
    found = {"losses": torch.tensor(losses, dtype=torch.float64), "sent": torch.tensor(sent_bytes)}
    with tuning.base() as model:
        ids = rows(5)
        found["base"] = model(input_ids=ids).logits.clone()
    found |= {f"state {key}": value.clone() for key, value in tuning.state().items()}
    found["tuned"] = tuning.model(input_ids=ids).logits.detach().clone()
    for key, piece in tuning.delta().pieces.items():
        found[f"delta {key}"] = piece.region.size(tuning.plan.shapes[key]) * torch.ones(1)
    return found


def _outcomes(rank: int, world: int, port: int, how: str, names: list[str], folder: Path) -> None:
    join(rank, world, port)
    for name in names:
        for dtype in (torch.float64, torch.float32):
            found = outcome(name, how, dtype=dtype)
            save_file({k: v.contiguous() for k, v in found.items()}, folder / f"{name}-{dtype}-{rank}.safetensors")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, torch.dtype], dict[str, Tensor]]:
    torch.set_num_threads(1)
    return {(n, d): outcome(n, "alone", dtype=d) for n in METHODS for d in (torch.float64, torch.float32)}


@pytest.mark.parametrize(("world", "how", "names"), [
    (2, "fsdp", [*METHODS]), (4, "fsdp", ["smt", "gps"]), (2, "ddp", [*METHODS]), (4, "ddp", ["smt"]),
])  # fmt: skip
def test_as_one_process(world: int, how: str, names: list[str], alone: Any, tmp_path: Path) -> None:
    together(_outcomes, world, how, names, tmp_path)
    for name in names:
        for dtype, near in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
            expected = alone[name, dtype]
            for rank in range(world):
                found = load_file(tmp_path / f"{name}-{dtype}-{rank}.safetensors")
                assert found.keys() == expected.keys()
                for key in expected.keys() - {"sent"}:
                    torch.testing.assert_close(
                        found[key], expected[key], rtol=near, atol=10 * near, msg=f"{name} {key}"
                    )
                torch.testing.assert_close(found["losses"], expected["losses"], rtol=near, atol=near)


def test_under_ddp_only_the_region_travels(tmp_path: Path) -> None:
    together(_outcomes, 2, "ddp", ["smt", "full"], tmp_path)
    sent = {n: load_file(tmp_path / f"{n}-torch.float32-0.safetensors")["sent"].item() for n in ("smt", "full")}
    total = sum(p.numel() for p in build("llama").parameters())
    assert sent["full"] == 4 * total
    assert sent["smt"] / sent["full"] == pytest.approx(0.05, rel=0.05)


def _resumed(rank: int, world: int, port: int, folder: Path) -> None:
    join(rank, world, port)
    state = load_file(folder / "state.safetensors")
    tuning = trained("smt", "fsdp", dtype=torch.float64, start=state)[1]
    save_file({k: v.contiguous() for k, v in tuning.state().items()}, folder / f"{rank}.safetensors")
    distributed.destroy_process_group()


def test_the_state_of_one_process_goes_on_in_two(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    state = trained("smt", "alone", dtype=torch.float64)[1].state()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "state.safetensors")
    expected = trained("smt", "alone", dtype=torch.float64, start=state)[1].state()
    together(_resumed, 2, tmp_path)
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9)


def _refused(rank: int, world: int, port: int, folder: Path) -> None:
    join(rank, world, port)
    said = []
    for method in ("sparsegrad", {"lisa": {"period": 1}}):
        model = build("llama")
        tuning = thrifty.attach(model, method, batches=probed())
        tuning.rebuild = lambda: None
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2)
        try:
            for _ in range(2):
                loss_of(model, rows(0)).backward()
                optimizer.step()
        except ThriftyError as error:
            said.append(str(error))
    (folder / f"{rank}.json").write_text(json.dumps(said))
    distributed.destroy_process_group()


def test_what_cannot_be_sharded_says_so(tmp_path: Path) -> None:
    together(_refused, 2, tmp_path)
    for rank in range(2):
        first, second = json.loads((tmp_path / f"{rank}.json").read_text())
        assert "a rotated matrix (sparsegrad) cannot be trained on a sharded model" in first
        assert "method 'lisa', which changes what is trained, cannot be trained on a sharded model" in second


def test_zero_3_is_refused_before_anything_is_written() -> None:
    model = build("llama")
    tuning = thrifty.attach(model, METHODS["smt"], budget=0.05, batches=probed())
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2)
    for p in model.parameters():
        p.ds_tensor = p  # type: ignore[attr-defined]  # what marks a weight that DeepSpeed has parted
    loss_of(model, rows(0)).backward()
    with pytest.raises(ThriftyError, match="DeepSpeed's ZeRO-3 cannot train in place: take ZeRO-2"):
        optimizer.step()
