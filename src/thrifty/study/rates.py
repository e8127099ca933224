"""The search for a learning rate on a grid that widens until the best rate has a worse one on both sides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

__all__ = ["best_rate", "is_interior", "rates_to_try", "written"]


def rates_to_try(grid: Sequence[float], found: Mapping[float, float], *, widen: int) -> list[float]:
    """The rates of a search as far as they are known: the grid, and beyond the edge where the best one lies.

    Args:
        found: loss by rate so far; infinite where a run failed.
        widen: how many rates beyond each edge at most.
    """
    tried = sorted(set(grid))
    while all(rate in found for rate in tried):
        best = best_rate({rate: found[rate] for rate in tried})
        below, above = sum(rate < min(grid) for rate in tried), sum(rate > max(grid) for rate in tried)
        if best == tried[0] and below < widen:
            tried.insert(0, _beside(tried[0], up=False))
        elif best == tried[-1] and above < widen:
            tried.append(_beside(tried[-1], up=True))
        else:
            break
    return tried


def best_rate(found: Mapping[float, float]) -> float | None:
    """The rate with the lowest finite loss; None where all failed."""
    finite = {rate: loss for rate, loss in found.items() if math.isfinite(loss)}
    return min(finite, key=lambda rate: finite[rate]) if finite else None


def is_interior(found: Mapping[float, float]) -> bool:
    """Whether a rate below and a rate above the best one were tried: the search reached both sides."""
    best = best_rate(found)
    return best is not None and min(found) < best < max(found)


def written(rate: float) -> str:
    """3e-3 for 0.003."""
    digits, power = f"{rate:.3e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def _beside(rate: float, *, up: bool) -> float:
    """The next of 1, 3, 10, 30, ... times a power of ten."""
    power = math.floor(math.log10(rate) + 1e-9)
    steps = [float(f"{digit}e{power + more}") for more in (-1, 0, 1) for digit in (1, 3)]
    if up:
        return min(step for step in steps if step > rate * 1.001)
    return max(step for step in steps if step < rate * 0.999)
