"""Host memory stays flat over 2,000 tiny steps, in a plain loop and in a run with evaluations and checkpoints."""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from families import batches, build
from tiny_run import configuration, prepare, start
from torch import Tensor

from thrifty.run.train import train
from thrifty.run.trainer import ThriftyTrainer
from thrifty.update.tuning import attach

STEPS, WARM = 2000, 500
# A leak of one small tensor, or of one container, at every tenth step is above these.
MORE_OBJECTS, MORE_TENSORS, MORE_BYTES = 150, 5, 3 * 2**20


def count() -> dict[str, int]:
    """What is alive, and resident bytes once the allocator gave back what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    alive = gc.get_objects()
    tensors = sum(issubclass(type(each), Tensor) for each in alive)
    return {"objects": len(alive), "tensors": tensors, "bytes": psutil.Process().memory_info().rss}


def plain_loop(folder: Path) -> list[dict[str, int]]:
    """Blocks in linear layers and in a tied head; the length differs from step to step."""
    model = build("gpt2", layers=1)
    method = {"random_blocks": {"block_size": 8, "target_modules": ["c_attn", "c_fc", "wte"], "scope": "per_matrix"}}
    optimizer = torch.optim.AdamW(attach(model, method, budget=0.05).parameters(), lr=1e-3)
    data = [batches(1, 2, length)[0] for length in range(6, 14)]
    counts = []
    for n in range(STEPS):
        if n == WARM:
            counts.append(count())
        model(**data[n % len(data)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*counts, count()]


def whole_run(folder: Path) -> list[dict[str, int]]:
    """`thrifty train` with logs, evaluations and checkpoints, counted between two steps."""
    counts, steps, real = [], [0], ThriftyTrainer.training_step

    def training_step(self: ThriftyTrainer, *args: Any, **kwargs: Any) -> Tensor:
        if steps[0] in (WARM, STEPS - 1):
            counts.append(count())
        steps[0] += 1
        return real(self, *args, **kwargs)

    ThriftyTrainer.training_step = training_step  # type: ignore[method-assign]
    config = configuration(
        prepare(folder), max_steps=STEPS, logging_steps=100, eval_steps=200, save_steps=200, save_total_limit=1
    )
    train(config)
    return counts


def measure(run: Callable[[Path], list[dict[str, int]]], folder: Path) -> None:
    torch.set_num_threads(1)
    (folder / "counts.json").write_text(json.dumps(run(folder)))


@pytest.mark.parametrize("run", [plain_loop, whole_run])
def test_memory_is_flat(run: Callable[[Path], list[dict[str, int]]], tmp_path: Path) -> None:
    child = start(measure, run, tmp_path)
    child.join()
    assert child.exitcode == 0
    warm, end = json.loads((tmp_path / "counts.json").read_text())
    more = {name: end[name] - warm[name] for name in warm}
    assert more["objects"] <= MORE_OBJECTS, more
    assert more["tensors"] <= MORE_TENSORS, more
    assert more["bytes"] <= MORE_BYTES, more
