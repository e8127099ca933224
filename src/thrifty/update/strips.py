"""Strips: the input columns that some block uses, one contiguous copy, shared by the modules that read the same input.

Which modules read the same input (q/k/v; gate/up) is seen while they run: the same tensor object, unmodified. Modules
found to share are given the union of their columns after the next optimizer step, never between a forward and its
backward, so that checkpointing saves the same shapes twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.entries import Entries
from ..core.region import Blocks
from ..kernels.entry_grad import EntryLayout
from ..kernels.region_grad import Layout, StripGroup
from ..kernels.region_ways import Runs

__all__ = ["Member", "Strips", "merge_pending"]


class Strips:
    """The union of columns of its members."""

    def __init__(self, columns: Tensor) -> None:
        self.columns = columns  # int64 [U], sorted
        self._runs = {torch.device("cpu"): Runs.of(columns)}
        self.members: list[weakref.ref[Member]] = []

    def runs(self, device: torch.device) -> Runs:
        """The columns for gathering, their index on `device`: copied there once."""
        if device in self._runs:
            return self._runs[device]
        runs = self._runs[torch.device("cpu")].to(device)
        if not torch.compiler.is_compiling():
            self._runs[device] = runs
        return runs


class Member:
    """One module's region of a weight of `shape`, in terms of the strip it shares. `transposed`: stored `[in, out]`, so
    that the rows are inputs."""

    def __init__(self, region: Blocks | Entries, shape: Sequence[int], *, transposed: bool) -> None:
        self.region, self.shape, self.transposed = region, tuple(shape), transposed
        self.bind(Strips(self._columns()))

    def _columns(self) -> Tensor:
        """The input columns used, sorted."""
        if isinstance(self.region, Entries):
            rows, cols = self.region.positions(self.shape)
            return (rows if self.transposed else cols).unique()
        groups = self.region.groups(self.shape)
        starts = [(g.rows, g.h) if self.transposed else (g.cols, g.w) for g in groups]
        return torch.cat([(start[:, None] + torch.arange(size)).flatten() for start, size in starts]).unique()

    def bind(self, strips: Strips) -> None:
        """Point the region at the columns of `strips`."""
        self.strips = strips
        self.enlist()
        self.layout = self._entries() if isinstance(self.region, Entries) else self._blocks(self.region)

    def _blocks(self, region: Blocks) -> Layout:
        return Layout(
            StripGroup(
                h=g.h,
                w=g.w,
                rows=tuple((self._slots(g.rows) if self.transposed else g.rows).tolist()),
                slots=tuple((g.cols if self.transposed else self._slots(g.cols)).tolist()),
                offset=g.offset,
            )
            for g in region.groups(self.shape)
        )

    def _entries(self) -> EntryLayout:
        assert isinstance(self.region, Entries)
        rows, cols = self.region.positions(self.shape)
        if self.transposed:
            return EntryLayout(self._slots(rows), cols)
        return EntryLayout(rows, self._slots(cols))

    def _slots(self, columns: Tensor) -> Tensor:
        return torch.searchsorted(self.strips.columns, columns)

    def enlist(self) -> None:
        """Be known to the strips; again after a deep copy, whose weak references still point at the original."""
        self.strips.members = [r for r in self.strips.members if r() is not None and r() is not self]
        self.strips.members.append(weakref.ref(self))


@dataclass
class _Last:
    """The strip taken last, held weakly: never `id` or `data_ptr`, which are reused once freed."""

    x: weakref.ref[Tensor]
    version: int
    strips: weakref.ref[Strips]
    columns: Tensor
    strip: weakref.ref[Tensor]
    dtype: torch.dtype


_last: list[_Last] = []
_pending: dict[tuple[weakref.ref[Strips], weakref.ref[Strips]], None] = {}  # a set that keeps its order


def take(x: Tensor, member: Member, *, dtype: torch.dtype) -> Tensor:
    """`x[..., columns]` as `[T, U]` in `dtype`, taken once for all members that read this very `x`."""
    strips = member.strips
    last = _last[0] if _last else None
    if last is not None and last.x() is x and last.version == x._version and last.dtype == dtype:
        other, strip = last.strips(), last.strip()
        if other is strips and strip is not None and last.columns is strips.columns:
            return strip
        if other is not None and other is not strips:
            _pending[weakref.ref(other), weakref.ref(strips)] = None
    strip = take_plain(x, strips, dtype=dtype)
    _last[:] = [_Last(weakref.ref(x), x._version, weakref.ref(strips), strips.columns, weakref.ref(strip), dtype)]
    return strip


def take_plain(x: Tensor, strips: Strips, *, dtype: torch.dtype) -> Tensor:
    """The plain form of `take`; without a copy where every column is used."""
    flat = x.detach().reshape(-1, x.shape[-1])
    if len(strips.columns) == flat.shape[1]:
        return flat.to(dtype)
    runs = strips.runs(x.device)
    # one stretch comes as a view, which would keep all of x
    return runs.take(flat).to(dtype, copy=runs.index is None, memory_format=torch.contiguous_format)


def merge_pending() -> None:
    """Give modules seen to share an input the union of their columns; pairs that meet in a module (q-k, k-v) are one
    group."""
    groups: list[list[Strips]] = []
    for a, b in _pending:
        first, second = a(), b()
        if first is None or second is None:
            continue
        meeting = [group for group in groups if first in group or second in group]
        groups = [group for group in groups if group not in meeting]
        groups.append(list(dict.fromkeys([strips for group in meeting for strips in group] + [first, second])))
    _pending.clear()
    for group in groups:
        union = Strips(torch.cat([strips.columns for strips in group]).unique())
        for strips in group:
            for member in [m for r in strips.members if (m := r()) is not None and m.strips is strips]:
                member.bind(union)
