"""Blocks spread over a matrix: all its outputs and inputs get one before any gets a second."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["spread", "spread_scores"]


def spread(scores: Tensor, *, blocks: int) -> Tensor:
    """Cells `[blocks, 2]` of a grid of scores `[rows, columns]`, chosen in rounds.

    Within a round a strip of the longer side gets at most one cell, a strip of the shorter at most the ratio of the
    sides, rounded up; the best cell that both of its strips have room for goes first.
    """
    rows, columns = scores.shape
    if rows < columns:
        return spread(scores.t(), blocks=blocks).flip(1)
    order = [divmod(cell, columns) for cell in torch.argsort(scores.flatten(), descending=True, stable=True).tolist()]
    found: list[tuple[int, int]] = []
    while order and len(found) < blocks:
        free, room = [1] * rows, [math.ceil(rows / columns)] * columns
        left = []
        for row, column in order:
            if free[row] and room[column] and len(found) < blocks:
                free[row] -= 1
                room[column] -= 1
                found.append((row, column))
            else:
                left.append((row, column))
        order = left
    return torch.tensor(found).reshape(-1, 2)


def spread_scores(scores: Tensor, *, share: float) -> Tensor:
    """Scores `[..., rows, columns]` that put the cells of `spread` first, about `share` of them, then all others. Last
    are the matrices (experts of a stack) whose scores are all zero: no token of the data came to them."""
    flat = scores.reshape(-1, *scores.shape[-2:])
    cells = flat[0].numel()
    used = [bool(grid.any()) for grid in flat]
    share *= len(used) / max(1, sum(used))
    found = torch.empty(flat.shape, dtype=torch.float64)
    for one, grid, seen in zip(found, flat, used, strict=True):
        first = spread(grid, blocks=min(cells, math.ceil(1.1 * share * cells) + 1))
        order = torch.argsort(grid.flatten(), descending=True, stable=True)
        one.view(-1)[order] = -torch.arange(cells, 2 * cells, dtype=torch.float64)
        one[first[:, 0], first[:, 1]] = -torch.arange(len(first), dtype=torch.float64)
        one -= 0 if seen else 2 * cells
    return found.reshape(scores.shape)
