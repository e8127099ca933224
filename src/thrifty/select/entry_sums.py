"""Sums of a statistic for every single number of a tensor: in a temporary file, because they are as large as the model.

A few numbers are in memory at a time, so that a probe for entries needs no more memory than one for blocks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

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
            values = statistic(g[start : start + _CHUNK].float(), w[start : start + _CHUNK]).float().cpu()
            self._any = self._any or bool(values.any())
            self._file.seek(4 * start)
            kept = np.fromfile(self._file, dtype=np.float32, count=len(values))
            kept += values.numpy()
            self._file.seek(4 * start)
            kept.tofile(self._file)

    def any(self) -> bool:
        """Is any number other than zero?"""
        return self._any

    def read(self) -> Tensor:
        """All sums, shaped as the tensor."""
        self._file.seek(0)
        return torch.from_numpy(np.fromfile(self._file, dtype=np.float32)).view(self.shape)
