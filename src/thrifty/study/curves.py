"""Loss curves, the time at which a quality is reached, and what nothing else beats at its cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Curve", "TimeTo", "curve", "mean_curve", "pareto", "seconds_to", "time_to"]


@dataclass(frozen=True)
class Curve:
    """Loss by step and by seconds since the start, probe included; all of one length, in the order of steps."""

    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class TimeTo:
    """`seconds` (None: never) until the mean curve reaches `loss`, the baseline's lowest; `ratio` to the baseline's
    own time."""

    loss: float
    seconds: float | None
    baseline_seconds: float

    @property
    def ratio(self) -> float | None:
        """None where the loss is never reached, or the baseline needs no time at all."""
        return None if self.seconds is None or not self.baseline_seconds else self.seconds / self.baseline_seconds


def curve(metrics: Sequence[Mapping[str, Any]], *, of: str = "eval loss") -> Curve:
    """The points of a record's `metrics` that hold `of`, "eval loss" or "train loss"."""
    points = sorted(
        (int(point["step"]), float(point["train time"]), float(point[of])) for point in metrics if of in point
    )
    return Curve(*(tuple(column) for column in zip(*points))) if points else Curve((), (), ())


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over seeds of seconds and of losses, at the steps that all curves have."""
    by_step = [dict(zip(c.steps, zip(c.seconds, c.losses))) for c in curves]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    means = [[sum(found[step][i] for found in by_step) / len(by_step) for step in steps] for i in (0, 1)]
    return Curve(tuple(steps), tuple(means[0]), tuple(means[1]))


def seconds_to(found: Curve, loss: float) -> float | None:
    """When the curve first comes down to `loss`, by straight lines between its points; None: never."""
    before: tuple[float, float] | None = None
    for seconds, value in zip(found.seconds, found.losses):
        if value <= loss:
            if before is None:
                return seconds
            return before[0] + (seconds - before[0]) * (before[1] - loss) / (before[1] - value)
        before = seconds, value
    return None


def time_to(mine: Sequence[Curve], baseline: Sequence[Curve]) -> TimeTo | None:
    """Until the mean of my curves (one for each seed) reaches the lowest value of the mean of the baseline's.

    None where either has no curve.
    """
    own, other = mean_curve(mine), mean_curve(baseline)
    if not own.losses or not other.losses:
        return None
    loss = min(other.losses)
    reached = seconds_to(other, loss)
    assert reached is not None
    return TimeTo(loss, seconds_to(own, loss), reached)


def pareto(costs: Sequence[float], qualities: Sequence[float], *, better: str = "higher") -> list[int]:
    """Which points no other beats: none is as cheap and better, or as good and cheaper. By rising cost.

    Args:
        costs: lower is better.
        qualities: as many; `better` says which way they improve, "higher" or "lower".
    """
    sign = 1 if better == "higher" else -1
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -sign * qualities[i])):
        equal = bool(front) and (costs[i], qualities[i]) == (costs[front[-1]], qualities[front[-1]])
        if not front or equal or sign * qualities[i] > sign * qualities[front[-1]]:
            front.append(i)
    return front
