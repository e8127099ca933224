"""The additive form of a change of a linear layer: y += x dW^T, where dW is never dense.

Shapes: T tokens, I inputs, O outputs, n blocks of `o` outputs by `i` inputs. Sums are taken in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.entries import Entries
from ..core.region import Blocks

__all__ = ["Addend", "of_pair", "of_region"]

Addend = Callable[[Tensor], Tensor]  # x [T, I] -> x dW^T [T, O], float32 or wider
_CHUNK = 2**22  # numbers that are gathered at a time


def of_region(region: Blocks | Entries, change: Tensor, shape: Sequence[int], *, transposed: bool) -> Addend:
    """The product with what changed in a matrix of `shape`.

    change: the packed differences `[numbers]`, on the device where they are used. transposed: the matrix is stored
    `[I, O]`, as in GPT-2's `Conv1D`; otherwise `[O, I]`.
    """
    device, outputs, inputs = change.device, int(shape[transposed]), int(shape[not transposed])
    if isinstance(region, Entries):
        stored = region.positions(shape)
        rows, columns = (stored[1], stored[0]) if transposed else stored
        return _Parts((_Singles(change, rows.to(device), columns.to(device)),), outputs)
    parts: list[_Part] = []
    for group in region.groups(shape):
        blocks = change[group.offset : group.offset + group.numbers].view(-1, group.h, group.w)
        rows_nh, columns_nw = (index.flatten(1).to(device) for index in group.element_index())
        if transposed:
            parts.append(_part(blocks.mT, columns_nw, rows_nh, outputs, inputs))
        else:
            parts.append(_part(blocks, rows_nh, columns_nw, outputs, inputs))
    return _Parts(tuple(parts), outputs)


def of_pair(left: Tensor, right: Tensor, *, scale: float, transposed: bool) -> Addend:
    """Two thin products: the matrix changed by `scale` times `left` `[rows, r]` times `right` `[r, columns]`, as it is
    stored."""
    down, up = (left.t(), right.t()) if transposed else (right, left)

    def add(x_TI: Tensor) -> Tensor:
        wide = torch.promote_types(x_TI.dtype, down.dtype)
        product = (x_TI.to(wide) @ down.t().to(wide)) @ up.t().to(wide)
        return product.to(wide) * scale  # an autocast around it makes products narrow

    return add


@dataclass(frozen=True)
class _Parts:
    """The sum over groups of equal blocks."""

    parts: tuple[_Part, ...]
    outputs: int

    def __call__(self, x_TI: Tensor) -> Tensor:
        # tokens innermost: inputs are then gathered, and outputs added, in long rows
        x_IT = x_TI.t().contiguous()
        wide = torch.promote_types(x_TI.dtype, torch.float32)
        total_OT = x_IT.new_zeros((self.outputs, x_IT.shape[1]), dtype=wide)
        for part in self.parts:
            total_OT = part.add(total_OT, x_IT)
        return total_OT.t()


@dataclass(frozen=True)
class _Singles:
    """Single numbers: `change` `[n]` at outputs `rows` and inputs `columns`."""

    change: Tensor
    rows: Tensor
    columns: Tensor

    def add(self, total_OT: Tensor, x_IT: Tensor) -> Tensor:
        step = max(1, _CHUNK // max(1, x_IT.shape[1]))
        for start in range(0, len(self.rows), step):
            here = slice(start, start + step)
            moved = x_IT.index_select(0, self.columns[here]).to(total_OT.dtype) * self.change[here, None]
            total_OT = total_OT.index_add(0, self.rows[here], moved.to(total_OT.dtype))
        return total_OT


@dataclass(frozen=True)
class _Scattered:
    """Blocks anywhere: `change` `[n, o, i]`, `rows` `[n, o]`, `columns` `[n, i]`."""

    change: Tensor
    rows: Tensor
    columns: Tensor

    def add(self, total_OT: Tensor, x_IT: Tensor) -> Tensor:
        n, o, i = self.change.shape
        step = max(1, _CHUNK // max(1, max(o, i) * x_IT.shape[1]))
        for start in range(0, n, step):
            here = slice(start, start + step)
            gathered = x_IT.index_select(0, self.columns[here].flatten()).unflatten(0, (-1, i))
            moved = torch.bmm(self.change[here].to(x_IT.dtype), gathered).flatten(0, 1)
            total_OT = total_OT.index_add(0, self.rows[here].flatten(), moved.to(total_OT.dtype))
        return total_OT


@dataclass(frozen=True)
class _Together:
    """Blocks that share all outputs, or all inputs, as one matrix `change` `[rows, columns]` of those rows and columns;
    None: all of them."""

    change: Tensor
    rows: Tensor | None
    columns: Tensor | None

    def add(self, total_OT: Tensor, x_IT: Tensor) -> Tensor:
        used = x_IT if self.columns is None else x_IT.index_select(0, self.columns)
        moved = (self.change.to(x_IT.dtype) @ used).to(total_OT.dtype)
        return total_OT + moved if self.rows is None else total_OT.index_add(0, self.rows, moved)


_Part = _Singles | _Scattered | _Together


def _part(change_noi: Tensor, rows_no: Tensor, columns_ni: Tensor, outputs: int, inputs: int) -> _Part:
    _, o, i = change_noi.shape
    if o == outputs:
        return _Together(change_noi.permute(1, 0, 2).flatten(1).contiguous(), None, columns_ni.flatten())
    if i == inputs:
        return _Together(change_noi.flatten(0, 1).contiguous(), rows_no.flatten(), None)
    return _Scattered(change_noi.contiguous(), rows_no, columns_ni)
