"""Region gradients: the chosen blocks of `dy^T x` without the dense product.

Shapes: T tokens, O outputs, U kept input columns (a strip of the input). Each group of equal blocks says where its rows
start in O and its columns start in U. Products run in the dtype of `dy`; the packed result has the leaf's dtype.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["StripGroup", "block_sums", "region_grad", "region_grad_dense"]

_SMALL = 32 * 32  # blocks below this size are computed a line at a time: one call each would cost more than its product


@dataclass(frozen=True)
class StripGroup:
    """Blocks of one size: `rows[k]` starts block k among the outputs, `slots[k]` among the strip's columns."""

    h: int
    w: int
    rows: tuple[int, ...]
    slots: tuple[int, ...]
    offset: int

    @property
    def numbers(self) -> int:
        return len(self.rows) * self.h * self.w


def _by_block(dy_TO: Tensor, x_TU: Tensor, group: StripGroup, out: Tensor) -> None:
    dy_OT, h, w = dy_TO.t(), group.h, group.w
    for k, (row, slot) in enumerate(zip(group.rows, group.slots, strict=True)):
        torch.mm(dy_OT[row : row + h], x_TU[:, slot : slot + w], out=out[k])


def _by_line(a_TA: Tensor, b_TB: Tensor, *, a: Sequence[int], b: Sequence[int], h: int, w: int, out: Tensor) -> None:
    """One product for all blocks that share a start in `b`: gathers their `a` columns side by side. `out`: [n, h,
    w]."""
    lines: dict[int, list[int]] = defaultdict(list)
    for k, start in enumerate(b):
        lines[start].append(k)
    starts = torch.tensor(a)
    arange = torch.arange(h)
    for start, blocks in lines.items():
        index = (starts[blocks][:, None] + arange).flatten().to(a_TA.device)
        product = a_TA.index_select(1, index).t() @ b_TB[:, start : start + w]
        out[blocks] = product.view(len(blocks), h, w)


def region_grad(dy_TO: Tensor, x_TU: Tensor, groups: Sequence[StripGroup], *, dtype: torch.dtype) -> Tensor:
    """Packed gradient `[size]` of the blocks: `dy[:, rows_k]^T x[:, cols_k]` for each block k."""
    packed = dy_TO.new_empty(sum(group.numbers for group in groups))
    for group in groups:
        h, w, n = group.h, group.w, len(group.rows)
        out = packed[group.offset : group.offset + group.numbers].view(n, h, w)
        if h * w >= _SMALL and min(h, w) >= 16:
            _by_block(dy_TO, x_TU, group, out)
        elif len(set(group.slots)) <= len(set(group.rows)):
            _by_line(dy_TO, x_TU, a=group.rows, b=group.slots, h=h, w=w, out=out)
        else:
            _by_line(x_TU, dy_TO, a=group.slots, b=group.rows, h=w, w=h, out=out.transpose(1, 2))
    return packed.to(dtype)


def region_grad_dense(dy_TO: Tensor, x_TU: Tensor, groups: Sequence[StripGroup], *, dtype: torch.dtype) -> Tensor:
    """The plain twin of `region_grad`: the dense product over the strip, then the blocks cut out of it."""
    dense = dy_TO.t() @ x_TU
    pieces = [
        dense[row : row + g.h, slot : slot + g.w].flatten()
        for g in groups
        for row, slot in zip(g.rows, g.slots, strict=True)
    ]
    return torch.cat(pieces).to(dtype) if pieces else dense.new_empty(0, dtype=dtype)


def block_sums(matrix: Tensor, *, h: int, w: int) -> Tensor:
    """Sum of each block of `matrix` `[..., out, in]` in float32: `[..., ceil(out / h), ceil(in / w)]`."""

    def reduce(t: Tensor, size: int, dim: int) -> Tensor:
        whole = t.shape[dim] // size * size
        main = t.narrow(dim, 0, whole).unflatten(dim, (-1, size)).sum(dim + 1) if whole else None
        if whole == t.shape[dim]:
            assert main is not None
            return main
        tail = t.narrow(dim, whole, t.shape[dim] - whole).sum(dim, keepdim=True)
        return tail if main is None else torch.cat([main, tail], dim)

    rows = reduce(matrix if matrix.dtype == torch.float64 else matrix.float(), h, matrix.ndim - 2)
    return reduce(rows, w, matrix.ndim - 1)
