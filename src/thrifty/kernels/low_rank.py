"""W + s L R, rounded once, with the same bits on every machine, and as much of the way back as rounding leaves.

A matrix product sums in an order that differs from one library to the next. Here the columns of L times the rows of R
are added one after the other by element-wise operations, whose result IEEE arithmetic fixes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["add_product", "subtract_product"]

_CHUNK = 2**18  # numbers at a time


def _rows(left: Tensor, right: Tensor, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """A few rows of s L R at a time."""
    scaled = left.detach() * scale
    right = right.detach()
    step = max(1, _CHUNK // right.shape[1])
    for start in range(0, len(scaled), step):
        rows = slice(start, start + step)
        total = torch.zeros_like(scaled[rows, :1] * right[:1])
        for k in range(len(right)):
            total += scaled[rows, k : k + 1] * right[k : k + 1]
        yield rows, total


def _moved(matrix: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    out = torch.empty_like(matrix.detach())
    for rows, product in _rows(left, right, scale):
        out[rows] = (matrix.detach()[rows].to(product.dtype) + product).to(out.dtype)
    return out


def add_product(matrix: Tensor, left: Tensor, right: Tensor, *, scale: float) -> Tensor:
    """`matrix` `[O, I]` plus scale times `left` `[O, r]` times `right` `[r, I]` (float32 or wider), in the dtype of
    `matrix`; `left` and `right` on its device."""
    return _moved(matrix, left, right, scale)


def subtract_product(matrix: Tensor, left: Tensor, right: Tensor, *, scale: float) -> Tensor:
    """The way back from `add_product`: the original but for numbers whose last bits rounding took."""
    return _moved(matrix, left, right, -scale)
