"""Region gradients: the chosen blocks of `dy^T x` without the dense product.

Shapes: T tokens, O outputs, U kept input columns (a strip of the input). Each group of equal blocks says where its rows
start in O and its columns start in U. Products run in the dtype of `dy`; the packed result has the leaf's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import Tensor

from .entry_grad import EntryLayout
from .region_ways import StripGroup, Way, choose

__all__ = ["Layout", "StripGroup", "block_sums", "region_grad", "region_grad_dense"]

_HAS_TRITON = find_spec("triton") is not None


class Layout:
    """Where the blocks of one matrix lie in a strip, and everything about computing them that does not depend on
    values: made once, used by every backward."""

    def __init__(self, groups: Iterable[StripGroup]) -> None:
        self.groups = tuple(groups)
        self.numbers = sum(group.numbers for group in self.groups)
        self._ways = {torch.device("cpu"): tuple(choose(group) for group in self.groups)}

    def ways(self, device: torch.device) -> tuple[Way, ...]:
        """One for each group, with their index tensors on `device`: copied there once."""
        if device in self._ways:
            return self._ways[device]
        ways = self._ways[torch.device("cpu")]
        if device.type == "cuda" and _HAS_TRITON:
            from .triton_region_grad import on_gpu  # here, because importing thrifty must not import triton

            ways = tuple(on_gpu(group, way) for group, way in zip(self.groups, ways, strict=True))
        ways = tuple(way.to(device) for way in ways)
        if not torch.compiler.is_compiling():
            self._ways[device] = ways
        return ways


def region_grad(dy_TO: Tensor, x_TU: Tensor, layout: Layout | EntryLayout, *, dtype: torch.dtype) -> Tensor:
    """Packed gradient `[size]` of a region: `dy[:, rows_k]^T x[:, cols_k]` for each block or entry k."""
    if isinstance(layout, EntryLayout):
        return layout.grad(dy_TO, x_TU, dtype=dtype)
    packed = dy_TO.new_empty(layout.numbers)
    for group, way in zip(layout.groups, layout.ways(dy_TO.device), strict=True):
        out = packed[group.offset : group.offset + group.numbers].view(len(group.rows), group.h, group.w)
        way.into(dy_TO, x_TU, out)
    return packed.to(dtype)


def region_grad_dense(dy_TO: Tensor, x_TU: Tensor, layout: Layout, *, dtype: torch.dtype) -> Tensor:
    """The plain twin of `region_grad`: the dense product over the strip, then the blocks cut out of it."""
    dense = dy_TO.t() @ x_TU
    pieces = [
        dense[row : row + g.h, slot : slot + g.w].flatten()
        for g in layout.groups
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
