"""Sums of a statistic for every single number of a tensor: in a temporary file, because they are as large as the model.

A few numbers are in memory at a time, so that a probe for entries needs no more memory than one for blocks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.processes import sum_over_processes
from ..kernels.region_grad import block_sums

__all__ = ["ENTRY_GRID", "EntrySums"]

ENTRY_GRID = (1, 1)
_CHUNK = 2**20  # numbers in memory at a time


class EntrySums:
    """float32 sums of one tensor of `shape`. The file has no name and goes with the object."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = torch.Size(shape)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the object
        self._file.truncate(4 * self.shape.numel())
        self._any = False

    def add(self, gradient: Tensor, weight: Tensor, statistic: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Add the statistic of each number."""
        g, w = gradient.reshape(-1), weight.detach().reshape(-1)
        for start in range(0, len(g), _CHUNK):
            self.add_at(start, statistic(g[start : start + _CHUNK].float(), w[start : start + _CHUNK]).float().cpu())

    def add_at(self, start: int, values: Tensor) -> None:
        """Add float32 `values` `[n]` to the n sums from `start` on, counted in the tensor made flat."""
        self._any = self._any or bool(values.any())
        self._file.seek(4 * start)
        kept = np.fromfile(self._file, dtype=np.float32, count=len(values))
        kept += values.numpy()
        self._file.seek(4 * start)
        kept.tofile(self._file)

    def merge(self) -> None:
        """Replace the sums by those over all processes, a few numbers in memory at a time."""
        for start in range(0, self.shape.numel(), _CHUNK):
            here = self._numbers(start, min(_CHUNK, self.shape.numel() - start))
            sum_over_processes(here)
            self._any = self._any or bool(here.any())
            self._file.seek(4 * start)
            here.numpy().tofile(self._file)

    def any(self) -> bool:
        """Is any number other than zero?"""
        return self._any

    def read(self) -> Tensor:
        """All sums, shaped as the tensor."""
        return self.rows(0, self.shape[0])

    def absolute_blocks(self, grid: tuple[int, int]) -> Tensor:
        """The absolute sums of the numbers of each block of shape `grid`, float64 `[..., block rows, block columns]`; a
        few rows in memory at a time."""
        h, w = grid
        out, columns = self.shape[-2:]
        step = max(1, _CHUNK // (h * columns)) * h
        found = []
        for matrix in range(self.shape[:-2].numel()):
            for start in range(0, out, step):
                rows = self._numbers(columns * (matrix * out + start), columns * min(step, out - start))
                found.append(block_sums(rows.view(-1, columns).abs(), h=h, w=w))
        return torch.cat(found).double().view(*self.shape[:-2], -1, found[0].shape[-1])

    def rows(self, start: int, stop: int) -> Tensor:
        """The sums of rows `start` to `stop` of the first dimension: a strip at a time for who has no room for all."""
        row = self.shape[1:].numel()
        return self._numbers(start * row, (stop - start) * row).view(-1, *self.shape[1:])

    def _numbers(self, start: int, count: int) -> Tensor:
        """`count` sums from `start` on, counted in the tensor made flat."""
        self._file.seek(4 * start)
        return torch.from_numpy(np.fromfile(self._file, dtype=np.float32, count=count))
