"""Entry gradients: single numbers of `dy^T x`, never the dense product at once.

Shapes: T tokens, O outputs, U kept input columns, n entries in row-major order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["EntryLayout", "entry_grad_dense"]

_CHUNK = 2**20  # numbers of the dense product that exist at a time
# Picking an entry costs as much as this many numbers of a dense product (float32 on one core; some 60 in bfloat16).
_SAMPLE_COST = 96


@dataclass(frozen=True)
class _Piece:
    """Consecutive entries whose rows lie in `[row, row + rows)`; `index`: their places in that part of the product."""

    row: int
    rows: int
    index: Tensor
    start: int


class EntryLayout:
    """Where the entries of one matrix lie in a strip: `rows[k]` among the outputs, `slots[k]` among the columns kept,
    both int64 `[n]`, sorted by row and then slot. How they are computed is decided once."""

    def __init__(self, rows: Tensor, slots: Tensor) -> None:
        self.rows, self.slots, self.numbers = rows, slots, len(rows)
        # only with its own rows and columns: who else shares the strip is not known at a resumed run's first step, and
        # a product of another size may sum in another order
        self._used = rows.unique(), slots.unique()
        self.sampled = _SAMPLE_COST * self.numbers < len(self._used[0]) * len(self._used[1])
        inside = tuple(torch.searchsorted(used, where) for used, where in zip(self._used, (rows, slots), strict=True))
        self._pieces = () if self.sampled else tuple(_pieces(*inside, len(self._used[1])))
        self._index: dict[torch.device, tuple[Tensor, ...]] = {}

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The index tensors on `device`: copied there once."""
        if device in self._index:
            return self._index[device]
        tensors = (self.rows, self.slots) if self.sampled else (*self._used, *(piece.index for piece in self._pieces))
        moved = tuple(tensor.to(device) for tensor in tensors)
        if not torch.compiler.is_compiling():
            self._index[device] = moved
        return moved

    def grad(self, dy_TO: Tensor, x_TU: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Packed gradient `[n]`: sum over tokens of `dy[:, rows_k] * x[:, slots_k]`, in `dtype`."""
        if self.sampled:
            return self._sample(dy_TO, x_TU, *self._on(dy_TO.device), dtype=dtype)
        rows, slots, *places = self._on(dy_TO.device)
        dy_TO, x_TU = _columns(dy_TO, rows), _columns(x_TU, slots)
        packed = dy_TO.new_empty(self.numbers)
        for piece, index in zip(self._pieces, places, strict=True):
            product = dy_TO[:, piece.row : piece.row + piece.rows].t() @ x_TU
            packed[piece.start : piece.start + len(index)] = product.flatten().index_select(0, index)
        return packed.to(dtype)

    def _sample(self, dy_TO: Tensor, x_TU: Tensor, rows: Tensor, slots: Tensor, *, dtype: torch.dtype) -> Tensor:
        tokens = max(1, _CHUNK // max(1, self.numbers))
        wide = torch.promote_types(dy_TO.dtype, torch.float32)
        total = dy_TO.new_zeros(self.numbers, dtype=wide)
        for dy, x in zip(dy_TO.split(tokens), x_TU.split(tokens), strict=True):
            total += (_picked(dy, rows, wide) * _picked(x, slots, wide)).sum(0)
        return total.to(dtype)


def _picked(matrix: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns in `dtype`. Where more are picked than there are, all change first: CPUs pick bfloat16 numbers slowly."""
    if len(places) > matrix.shape[1]:
        return matrix.to(dtype).index_select(1, places)
    return matrix.index_select(1, places).to(dtype)


def _columns(matrix: Tensor, used: Tensor) -> Tensor:
    return matrix if len(used) == matrix.shape[1] else matrix.index_select(1, used)


def _pieces(rows: Tensor, slots: Tensor, columns: int) -> Iterator[_Piece]:
    height = max(1, _CHUNK // columns)
    start = 0
    while start < len(rows):
        row = int(rows[start])
        stop = int(torch.searchsorted(rows, row + height))
        last = int(rows[stop - 1])
        yield _Piece(row, last - row + 1, (rows[start:stop] - row) * columns + slots[start:stop], start)
        start = stop


def entry_grad_dense(dy_TO: Tensor, x_TU: Tensor, layout: EntryLayout, *, dtype: torch.dtype) -> Tensor:
    """The plain twin of `EntryLayout.grad`: the dense product, then the entries picked out of it."""
    return (dy_TO.t() @ x_TU)[layout.rows, layout.slots].to(dtype)
