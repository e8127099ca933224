"""How far scores that are ratios of sums over rows can be trusted, and the difference of two methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ThriftyError

__all__ = ["Interval", "Rows", "Spread", "bootstrap", "mean", "paired_bootstrap", "score", "standard_error"]

Rows = Sequence[Sequence[float]]  # [numerator, denominator] of each row of a test set
_Array = NDArray[np.float64]
_AT_ONCE = 4_000_000  # numbers of one array of weights: 32 MB


@dataclass(frozen=True)
class Interval:
    """`difference` of the first method's score minus the second's, and the ends of its confidence interval."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """One method's `score`, the ends of its confidence interval, and its standard `error` (of the bootstrap)."""

    score: float
    low: float
    high: float
    error: float


def mean(values: Sequence[float]) -> float:
    """The plain mean; at least one value."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean: the sample standard deviation (n - 1) over sqrt(n); None for a single value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def score(rows: Rows) -> float:
    """sum of numerators / sum of denominators; NaN where the denominators sum to 0 (no such thing was asked for)."""
    above, below = math.fsum(row[0] for row in rows), math.fsum(row[1] for row in rows)
    return above / below if below else math.nan


def paired_bootstrap(
    a: Sequence[Rows], b: Sequence[Rows], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile interval of score(a) - score(b), of two methods measured on the same rows with the same seeds.

    a, b: for each seed the rows' [numerator, denominator], all of one length and in one order. A method's score is the
    mean over seeds of sum(numerators) / sum(denominators).

    Each resample draws seeds and rows with replacement, the same for both methods, and the same rows for every seed
    (seeds share the test set, so more seeds do not make more rows). The interval covers chance in which rows the test
    set has and, as far as the seeds show it, chance in training (seed: order of data, initial values). It does not
    cover what all runs have in common: the training data, the base model, the learning rate's choice. A few seeds show
    too little of their own spread: n drawn from n seeds have (n - 1) / n of the sample variance, so with 2 seeds half
    of it, and with one seed none. Percentile intervals are somewhat narrow for few rows. Where the denominators of a
    resample sum to 0, it is left out.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 (two-level data) and 13
    (percentiles). ThriftyError where the two differ in seeds or rows.
    """
    first, second = _array(a), _array(b)
    if first.shape != second.shape:
        raise ThriftyError(
            f"a paired comparison needs the same seeds and rows on both sides; here {first.shape[:2]} and "
            f"{second.shape[:2]} (seeds, rows): compare runs of one test set"
        )
    draws = _resample(lambda weights: _ratios(weights, first) - _ratios(weights, second), first.shape, resamples, seed)
    low, high = _ends(draws, confidence)
    difference = _ratios(np.ones((1, first.shape[1])), first) - _ratios(np.ones((1, first.shape[1])), second)
    return Interval(float(difference.mean()), low, high)


def bootstrap(a: Sequence[Rows], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Spread:
    """Percentile interval and standard error of one method's own score, drawn as in `paired_bootstrap`.

    The standard error is the standard deviation of the resampled scores (Efron and Tibshirani, chapter 6), so unlike
    `standard_error` it holds the test rows' chance too and exists for one seed.
    """
    rows = _array(a)
    draws = _resample(lambda weights: _ratios(weights, rows), rows.shape, resamples, seed)
    low, high = _ends(draws, confidence)
    defined = draws[~np.isnan(draws)]
    error = float(defined.std(ddof=1)) if len(defined) > 1 else math.nan
    return Spread(float(_ratios(np.ones((1, rows.shape[1])), rows).mean()), low, high, error)


def _array(seeds: Sequence[Rows]) -> _Array:
    """[seeds, rows, 2]; ThriftyError where seeds differ in their rows, or there are none."""
    lengths = {len(rows) for rows in seeds}
    if len(lengths) != 1 or 0 in lengths:
        raise ThriftyError(f"every seed needs the same rows, at least one; here {sorted(lengths) or 'no seeds'}")
    return np.array(seeds, dtype=np.float64)


def _ratios(weights: _Array, rows: _Array) -> _Array:
    """Scores by resample and seed, [resamples, seeds], where row r counts weights[:, r] times."""
    above, below = weights @ rows[:, :, 0].T, weights @ rows[:, :, 1].T
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)


def _resample(scores: Callable[[_Array], _Array], shape: tuple[int, ...], resamples: int, seed: int) -> _Array:
    """The mean over drawn seeds of `scores` of drawn rows, `resamples` times; draws depend on shape and seed alone."""
    seeds, rows = shape[:2]
    size = max(1, min(resamples, _AT_ONCE // rows))
    parts = []
    for start in range(0, resamples, size):
        weights, drawn = _draws(seeds, rows, min(size, resamples - start), (seed, start))
        parts.append(np.take_along_axis(scores(weights), drawn, axis=1).mean(axis=1))
    return np.concatenate(parts)


@lru_cache(maxsize=4)  # a study compares many methods on the same few test sets
def _draws(seeds: int, rows: int, count: int, start: tuple[int, int]) -> tuple[_Array, NDArray[np.int64]]:
    """How often each row was drawn, [count, rows], and which seeds, [count, seeds]."""
    source = np.random.default_rng(start)
    drawn = source.integers(rows, size=(count, rows)) + rows * np.arange(count)[:, None]
    weights = np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows).astype(np.float64)
    return weights, source.integers(seeds, size=(count, seeds))


def _ends(draws: _Array, confidence: float) -> tuple[float, float]:
    defined = draws[~np.isnan(draws)]
    if not len(defined):
        return math.nan, math.nan
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
