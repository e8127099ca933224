"""Momentum made orthogonal: each step moves a matrix equally far along all its directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import ThriftyError

__all__ = ["Muon"]

_QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan 2024: takes singular values in (0, 1] to about .7 to 1.2 in five rounds


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982): of
    M = momentum M + (1 - momentum) G the nearest orthogonal matrix, by five Newton-Schulz rounds. One state per number,
    where AdamW has two.

    Each leaf of two axes is a matrix, and so is each block of a leaf of blocks, where their size does not divide the
    weight (a flat leaf whose `block_sizes` say what lies in it) each of its own size. Whole columns of one weight are
    one matrix together, and so are whole rows.

    size: what the learning rate is. `spectral`: a step's spectral norm. `rms`: five times the root mean square of a
        step's numbers (Liu et al., equation 4), so that AdamW's rates carry over.
    """

    momentum: float = 0.95
    nesterov: bool = True
    size: Literal["spectral", "rms"] = "rms"

    def optimizer(
        self, leaves: Mapping[str, nn.Parameter], *, learning_rate: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """The optimizer of `leaves`, by parameter name. ThriftyError where one is no matrix."""
        for name, leaf in leaves.items():
            if leaf.ndim not in (2, 3) and not hasattr(leaf, "block_sizes"):
                raise ThriftyError(
                    f"Muon moves matrices, but what is trained of {name} has shape {tuple(leaf.shape)}: take AdamW "
                    "(in a run file optim: adamw_torch, and a learning_rate for it), or a method that trains blocks, "
                    "rows or columns"
                )
        return _Muon(leaves.values(), lr=learning_rate, weight_decay=weight_decay, muon=self)


class _Muon(torch.optim.Optimizer):
    """As `torch.optim.Muon`, which takes leaves of two axes only."""

    def __init__(self, leaves: Iterable[nn.Parameter], *, lr: float, weight_decay: float, muon: Muon) -> None:
        super().__init__(leaves, {"lr": lr, "weight_decay": weight_decay})
        self.muon = muon

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for leaf in group["params"]:
                if leaf.grad is not None:
                    leaf.mul_(1 - group["lr"] * group["weight_decay"])
                    leaf.sub_(self._direction(leaf), alpha=group["lr"])
        return loss

    def _direction(self, leaf: nn.Parameter) -> Tensor:
        """A step's change at a learning rate of 1, like `leaf`."""
        gradient, state = leaf.grad, self.state[leaf]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        moment = state["momentum_buffer"].lerp_(gradient, 1 - self.muon.momentum)
        moved = gradient.lerp(moment, self.muon.momentum) if self.muon.nesterov else moment
        sizes: Sequence[tuple[int, int, int]] = getattr(leaf, "block_sizes", ())
        if not sizes:
            return self._step(moved).to(leaf.dtype)
        pieces = moved.split([math.prod(size) for size in sizes])
        steps = [self._step(piece.view(size)).flatten() for piece, size in zip(pieces, sizes, strict=True)]
        return torch.cat(steps).to(leaf.dtype)

    def _step(self, moved: Tensor) -> Tensor:
        """Of a matrix, or of blocks of one size; like `moved`, float32."""
        matrices_NHW = _matrices(moved)
        factor = 0.2 * max(matrices_NHW.shape[1:]) ** 0.5 if self.muon.size == "rms" else 1.0
        return _orthogonal(matrices_NHW).view_as(moved) * factor


def _matrices(leaf: Tensor) -> Tensor:
    """`leaf` as matrices [N, H, W]. Its packed columns are [k, out, 1], its packed rows [k, 1, in]."""
    if leaf.ndim == 2:
        return leaf.unsqueeze(0)
    return leaf.flatten(1).unsqueeze(0) if 1 in leaf.shape[1:] else leaf


def _orthogonal(matrices_NHW: Tensor) -> Tensor:
    """About the nearest orthogonal matrix to each: all singular values become .7 to 1.2 or so. Float32 [N, H, W]."""
    x_NHW = matrices_NHW.float()
    tall = x_NHW.shape[1] > x_NHW.shape[2]
    if tall:
        x_NHW = x_NHW.mT
    x_NHW = x_NHW / x_NHW.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    first, third, fifth = _QUINTIC
    for _ in range(5):
        square_NHH = x_NHW @ x_NHW.mT
        x_NHW = first * x_NHW + (third * square_NHH + fifth * square_NHH @ square_NHH) @ x_NHW
    return (x_NHW.mT if tall else x_NHW).contiguous()
