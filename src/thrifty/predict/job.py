"""What is to be estimated: a model's shape, a method, and the batches of one run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..core.budget import Budget
from ..core.method import Method

__all__ = ["DTYPES", "Job"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run, as far as it decides memory and time.

    Attributes:
        config: the model's configuration (transformers' PreTrainedConfig).
        method: how it trains; `budget` as in a run.
        rows: of one micro-batch; `accumulation` of them make a step.
        length: tokens of a row in the widest batch.
        mean_length: tokens of a row in the mean batch, padding included.
        labels: share of the tokens that have a label.
        padded: whether rows of a batch differ in length: attention then takes a mask.
        steps: optimizer steps of the whole run.
        autocast: None, or the dtype of the products.
        checkpointing: whether layers are run again in backward; `checkpoint_layers`: the lowest of them, None: all.
        optimizer: transformers' name.
        quantize: how the base's linear layers are quantized, if at all.
        probe_rows, probe_units: of methods that look at gradients first.
        notes: what was assumed, for the reader.
    """

    config: Any
    method: Method
    budget: Budget | None = None
    rows: int = 8
    accumulation: int = 1
    length: int = 1024
    mean_length: float | None = None
    labels: float = 1.0
    padded: bool = True
    steps: int = 1
    dtype: torch.dtype = torch.float32
    quantize: str | None = None
    autocast: torch.dtype | None = None
    checkpointing: bool = False
    checkpoint_layers: int | None = None
    optimizer: str = "adamw_torch_fused"
    probe_rows: int = 4
    probe_units: int = 16
    trust_remote_code: bool = False
    notes: tuple[str, ...] = ()

    def recomputes(self, layer: int) -> bool:
        """Whether the layer of this number is computed again in backward."""
        return self.checkpointing and (self.checkpoint_layers is None or layer < self.checkpoint_layers)

    @property
    def tokens(self) -> float:
        """Positions of one optimizer step, padding included."""
        return self.rows * self.accumulation * (self.mean_length or self.length)
