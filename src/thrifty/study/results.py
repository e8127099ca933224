"""What a study found: scores with their intervals, differences to a baseline, costs, searches and failures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .curves import Curve, TimeTo
from .measures import better
from .rates import best_rate, is_interior
from .records import Record
from .rule import Rule

__all__ = ["TINY", "Costs", "Difference", "Entry", "Failure", "Results", "Score", "SearchResult"]

TINY = 1e-9  # below it a difference is rounding


@dataclass(frozen=True, kw_only=True)
class Score:
    """A measure of one method at one budget. `low`, `high`: 95 % interval over seeds and rows; `error`: the standard
    error over both; `standard_error`: over seeds alone. None where rows, or a second seed, are missing."""

    mean: float
    standard_error: float | None
    by_seed: Mapping[int, float]
    low: float | None = None
    high: float | None = None
    error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A score minus another's, over the seeds both have. `low`, `high`: 95 % paired bootstrap interval, None where
    rows are missing or differ."""

    to: str
    measure: str
    value: float
    low: float | None
    high: float | None
    seeds: tuple[int, ...]

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the interval excludes 0, else `unclear`."""
        if self.low is None or self.high is None or (self.low <= TINY and self.high >= -TINY):
            return "unclear"
        return "better" if (self.value > 0) == (better(self.measure) == "higher") else "worse"


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Means over the finished seeds; None where no run says. Bytes, seconds, tokens per second."""

    trainable: float | None = None
    total: float | None = None
    peak_bytes: float | None = None
    train_seconds: float | None = None
    probe_seconds: float | None = None
    tokens_per_second: float | None = None
    file_bytes: float | None = None

    @property
    def share(self) -> float | None:
        """Trained parameters over the model's."""
        return self.trainable / self.total if self.trainable is not None and self.total else None


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """`losses`: on held-out training rows, by learning rate; infinite where the run failed."""

    losses: Mapping[float, float]

    @property
    def best(self) -> float | None:
        """The rate of the lowest loss."""
        return best_rate(self.losses)

    @property
    def interior(self) -> bool:
        """Searched to both sides: a lower and a higher rate than the best were tried."""
        return is_interior(self.losses)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method at one budget on one task. `failed`: message by seed; `forgetting`: the rise over the base model;
    `chosen`: the share of its numbers that is trained, by tensor; `difference`s are by measure."""

    task: str
    method: str
    budget: str
    seeds: tuple[int, ...]
    failed: Mapping[int, str]
    scores: Mapping[str, Score]
    costs: Costs
    learning_rate: float | None
    search: SearchResult | None
    curves: Mapping[int, Curve]
    train_curves: Mapping[int, Curve]
    chosen: Mapping[str, float]
    differences: Mapping[str, Difference] = field(default_factory=dict)
    forgetting: Difference | None = None
    time_to: TimeTo | None = None

    @property
    def label(self) -> str:
        """`smt 1%`; the method's name alone where it sets its size itself."""
        return self.method if self.budget == "own" else f"{self.method} {self.budget}"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that failed: the name of its record, and why."""

    name: str
    stage: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """A whole study. `entries` in the order task, method, trained parameters; `bases`: the model before training, by
    task and measure; `mains`: each task's main measure; `rules`: which measures count, by task; `records`: all runs."""

    name: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    baseline: str | None
    entries: tuple[Entry, ...]
    bases: Mapping[str, Mapping[str, Score]]
    mains: Mapping[str, str]
    rules: Mapping[str, Mapping[str, Rule]]
    failures: tuple[Failure, ...]
    notes: tuple[str, ...]
    records: tuple[Record, ...]

    def of(self, task: str) -> tuple[Entry, ...]:
        """The entries of one task."""
        return tuple(entry for entry in self.entries if entry.task == task)

    def gain(self, entry: Entry) -> float | None:
        """How much better than the base model on the task's main measure; above 0 is better whichever way it runs."""
        measure = self.mains[entry.task]
        base, mine = self.bases.get(entry.task, {}).get(measure), entry.scores.get(measure)
        if base is None or mine is None:
            return None
        return (mine.mean - base.mean) * (1 if better(measure) == "higher" else -1)
