"""A matrix trained in a rotated basis: W = W0 + V S U; each step sees the largest gradients of S only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..core.region import Whole
from ..core.rotated import Basis, Rotated
from ..delta import LowRankPiece, Piece
from .part import Part
from .sharded import refuse_sharded
from .steps import listen, stop_listening

__all__ = ["RotatedPart"]


class RotatedPart(Part):
    """S, of the shape of `W`, is the leaf. `W` holds the result after each step, so that forward is the base's own; the
    dense gradient of `W`, one matrix at a time, is rotated to that of S."""

    region: Rotated

    @property
    def gathers(self) -> Basis:
        return self.region.basis

    def arm(self) -> None:
        super().arm()
        listen(self)
        self.region.basis.factors(self.weight)  # before code is compiled, which would see them appear

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().convert(fn)
        self.region.basis.factors(self.weight)

    def disarm(self) -> None:
        super().disarm()
        stop_listening(self)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Leave the `k` largest |gradient| of S, summed over micro-batches and processes, to the optimizer; the others
        become zero."""
        gradient = self.leaf.grad
        held = any(p is self.leaf for group in optimizer.param_groups for p in group["params"])
        if gradient is None or not held:
            return
        refuse_sharded(self.leaf, "a rotated matrix (sparsegrad)")
        flat = gradient.view(-1)
        index = flat.abs().topk(self.region.k, sorted=False).indices
        kept = flat[index]
        flat.zero_()
        flat[index] = kept

    def after_step(self, optimizer: Optimizer) -> None:
        """Nothing: the values are written already."""

    def values(self) -> Tensor:
        """W0 + V S U, rounded once to the dtype of `W`."""
        assert self.original is not None
        offset = self.region.basis.back(self.leaf)
        return (self.original.to(offset.dtype) + offset).to(self.weight.dtype)

    def piece(self, original: Tensor) -> Piece | LowRankPiece:
        """All of the matrix, before and after: V S U has no zero."""
        piece = super().piece(original)
        assert isinstance(piece, Piece)
        return replace(piece, region=Whole())

    @torch.no_grad()
    def adopt_weight(self) -> None:
        """`W` was loaded from outside: S becomes what it holds above the original values, in the basis."""
        assert self.original is not None
        above = self.weight.detach().to(self.leaf.dtype) - self.original.to(self.leaf.dtype)
        self.leaf.copy_(self.region.basis.gather(above))
        self.dirty = False
        self.stamp += 1
