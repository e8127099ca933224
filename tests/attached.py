"""A tiny model with random blocks attached, and a step on it."""

from __future__ import annotations

from typing import Any

import torch
from families import batches, build
from torch import Tensor

from thrifty.update.tuning import Tuning, attach

__all__ = ["BATCH", "random_blocks", "step"]

(BATCH,) = batches(1, 3, 10)


def step(tuning: Any, optimizer: Any, batch: dict[str, Tensor] = BATCH) -> None:
    optimizer.zero_grad()
    tuning.model(**batch).loss.backward()
    optimizer.step()


def random_blocks(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Tuning]:
    model = build(family, dtype, layers=2)
    return model, attach(model, {"random_blocks": {"block_size": 8} | options}, budget=0.05)
