"""Momentum made orthogonal: each step moves a matrix equally far along all its directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..core.errors import ThriftyError

__all__ = ["Muon"]


@dataclass(frozen=True, kw_only=True)
class Muon:
    """PyTorch's Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982): of
    M = momentum M + (1 - momentum) G the nearest orthogonal matrix, by five Newton-Schulz steps in bfloat16. The
    learning rate is the spectral norm of a step, whatever the size of a square leaf. One state per number, where AdamW
    has two."""

    momentum: float = 0.9
    nesterov: bool = True

    def optimizer(
        self, leaves: Mapping[str, nn.Parameter], *, learning_rate: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """The optimizer of `leaves`, by parameter name. ThriftyError where one is no matrix."""
        for name, leaf in leaves.items():
            if leaf.ndim != 2:
                raise ThriftyError(
                    f"Muon moves matrices, but what is trained of {name} has shape {tuple(leaf.shape)}: take AdamW "
                    "(in a run file optim: adamw_torch, and a learning_rate for it)"
                )
        return torch.optim.Muon(
            leaves.values(),
            lr=learning_rate,
            weight_decay=weight_decay,
            momentum=self.momentum,
            nesterov=self.nesterov,
            adjust_lr_fn="original",
        )
