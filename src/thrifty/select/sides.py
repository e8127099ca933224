"""Second moments of gradients on both sides, summed over all matrices of one type: what HOSVD's factors come from.

The gradients G_i of a type, stacked to a 3-tensor, have the mode factors of the eigenvectors of sum_i G_i G_i^T and of
sum_i G_i^T G_i. The sums together can be larger than a gradient, so they lie in temporary files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.errors import ThriftyError
from ..core.rotated import Basis
from .entry_sums import EntrySums

__all__ = ["SIDES", "SideSums", "side_sums"]

SIDES = "side_moments"
_CHUNK = 2**20  # numbers of each operand in memory at a time


class SideSums:
    """The sums of one type of matrices, stored as `[..., rows, columns]`."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = EntrySums((rows, rows)), EntrySums((columns, columns))

    def add(self, gradient: Tensor) -> None:
        """Add a gradient `[rows, columns]`, or one for each stacked expert."""
        for g in gradient.flatten(0, -3) if gradient.ndim == 3 else [gradient]:
            _add_product(self.rows, g)
            _add_product(self.columns, g.t())

    def merge(self) -> None:
        """Replace the sums by those over all processes."""
        self.rows.merge()
        self.columns.merge()

    def any(self) -> bool:
        """Is any number other than zero?"""
        return self.rows.any()

    def basis(self, name: str) -> Basis:
        """HOSVD's factors, the direction of most energy first. ThriftyError names `name` where they are not finite."""
        found = []
        for sums in (self.rows, self.columns):
            moments = sums.read().double()
            if not bool(torch.isfinite(moments).all()):
                raise ThriftyError(
                    f"the probe's gradients of {name} and its like are not finite: the loss overflows on this data; "
                    "try dtype float32, or look for broken rows"
                )
            found.append(torch.linalg.eigh(moments).eigenvectors.flip(1).float().contiguous())
        return Basis(*found)


def _add_product(sums: EntrySums, matrix: Tensor) -> None:
    """Add M M^T, a few rows at a time."""
    n, width = matrix.shape
    step = max(1, _CHUNK // max(n, width))
    for i in range(0, n, step):
        few = matrix[i : i + step].float()
        strip = torch.cat([few @ matrix[j : j + step].float().t() for j in range(0, n, step)], 1)
        sums.add_at(i * n, strip.flatten().cpu())


def side_sums(parameters: Mapping[str, Tensor]) -> dict[str, SideSums]:
    """By parameter name, sums shared by all of one type: the same name but for the layer's number (and an expert's),
    the same shape."""
    by_type: dict[tuple[str, int, int], SideSums] = {}
    found = {}
    for name, parameter in parameters.items():
        rows, columns = parameter.shape[-2:]
        key = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name), rows, columns
        found[name] = by_type.setdefault(key, SideSums(rows, columns))
    return found
