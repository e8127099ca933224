"""The best set of tensors under a ceiling on backward's FLOPs, by dynamic programming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .flops import Link, chain_flops

__all__ = ["best_under"]


def best_under(chain: Sequence[Link], importance: Mapping[str, float], *, ceiling: float, grid: int = 1000) -> set[str]:
    """The tensors of `chain` with the largest total importance that cost at most `ceiling` FLOPs (`chain_flops`).

    FLOPs are rounded to `grid` steps of the full backward's; where the rounded plan is above the ceiling, it is made
    one step lower. Empty where nothing of positive importance fits.
    """
    unit = chain_flops(chain, {link.name for link in chain if link.name is not None}) / grid
    for room in range(int(ceiling / unit + 1e-9), -1, -1):
        chosen = _solve(chain, importance, unit=unit, room=room)
        if chain_flops(chain, chosen) <= ceiling * (1 + 1e-9):
            return chosen
    return set()


def _solve(chain: Sequence[Link], importance: Mapping[str, float], *, unit: float, room: int) -> set[str]:
    """For each deepest tensor: its importance and the best set above it, in the room that passing them all leaves."""
    best = torch.zeros(room + 1, dtype=torch.float64)  # largest importance within that many units
    taken: list[torch.Tensor] = []
    passed, top, end = 0.0, 0.0, (-1, 0)  # the deepest tensor of the best set, and the units left to those above it
    for depth, link in enumerate(chain):
        value = importance.get(link.name, 0.0) if link.name is not None else 0.0
        weight = round(link.weight_flops / unit)
        free = room - round(passed / unit) - weight
        if value > 0 and free >= 0 and value + float(best[free]) > top:
            top, end = value + float(best[free]), (depth, free)
        take = torch.zeros(room + 1, dtype=torch.bool)
        if value > 0 and weight <= room:
            with_it = best[: room + 1 - weight] + value
            take[weight:] = with_it > best[weight:]
            best = torch.cat([best[:weight], torch.maximum(best[weight:], with_it)])
        taken.append(take)
        passed += link.pass_flops
    depth, units = end
    chosen = set[str]()
    if depth < 0:
        return chosen
    name = chain[depth].name
    assert name is not None
    chosen.add(name)
    for i in range(depth - 1, -1, -1):
        name = chain[i].name
        if name is not None and bool(taken[i][units]):
            chosen.add(name)
            units -= round(chain[i].weight_flops / unit)
    return chosen
