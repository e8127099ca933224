"""The blocks on the diagonal of each matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..core.budget import Budget
from ..core.errors import ThriftyError
from ..core.plan import Plan
from ..core.region import Blocks
from .fixed import FixedSize
from .layers import Layers
from .targets import targets

__all__ = ["Diagonal"]


@dataclass(frozen=True, kw_only=True)
class Diagonal(FixedSize):
    """`blocks` blocks on the diagonal of each `[out, in]`, each `ceil(out / blocks)` x `ceil(in / blocks)`; the last
    ones are smaller, or missing, where that does not divide. A budget beside it is only checked."""

    blocks: int = 64
    target_modules: str | Sequence[str] = "all-linear"
    layers: Layers = None

    def __post_init__(self) -> None:
        if isinstance(self.blocks, bool) or not isinstance(self.blocks, int) or self.blocks < 1:
            raise ThriftyError(f"blocks {self.blocks!r} is not valid: give how many lie on the diagonal, 64 for 1/64")

    @property
    def size_and_fix(self) -> tuple[str, str]:
        return "the diagonals", f"raise blocks (now {self.blocks})"

    def select(self, model: nn.Module, *, probe: object, budget: Budget | None, seed: int) -> Plan:
        regions = {}
        for name, target in targets(model, self.target_modules, layers=self.layers).items():
            out, columns = target.shape[-2:]
            h, w = -(-out // self.blocks), -(-columns // self.blocks)
            steps = torch.arange(min(-(-out // h), -(-columns // w)))
            index = torch.stack([steps, steps], 1)
            if len(target.shape) == 3:
                experts = torch.arange(target.shape[0]).repeat_interleave(len(steps))
                index = torch.cat([experts[:, None], index.repeat(target.shape[0], 1)], 1)
            regions[name] = Blocks((h, w), index)
        return Plan.of(model, regions)
