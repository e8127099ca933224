"""What a study shows, in sentences and in numbers as people read them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from .measures import better
from .results import TINY, Difference, Entry, Results, Score

__all__ = [
    "bytes_words",
    "caveats",
    "count_words",
    "headlines",
    "number",
    "plus_minus",
    "seconds_words",
    "slug",
    "span",
]

FEW_SEEDS = 5


def number(value: float | None, *, signed: bool = False) -> str:
    """Three decimals, four below 0.01, three digits where that would not do; empty for None."""
    if value is None:
        return ""
    if abs(value) < TINY:
        return "0"
    digits = ".3g" if not 0.001 <= abs(value) < 1000 else ".4f" if abs(value) < 0.01 else ".3f"
    return f"{value:{'+' if signed else ''}{digits}}"


def plus_minus(error: float | None) -> str:
    """` ± 0.012`; empty where there is no standard error."""
    return "" if error is None else f" ± {error:.3f}" if error >= 0.01 else f" ± {error:.4f}"


def span(low: float | None, high: float | None, *, signed: bool = False) -> str:
    """`0.391 to 0.485`; empty where there is no interval."""
    if low is None or high is None:
        return ""
    return f"{number(low, signed=signed)} to {number(high, signed=signed)}"


def count_words(value: float | None) -> str:
    """`1.3M` of 1,300,000."""
    if value is None:
        return ""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def bytes_words(value: float | None) -> str:
    """`5.2 MiB`."""
    if value is None:
        return ""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def seconds_words(value: float | None) -> str:
    """`4 min 32 s`."""
    if value is None:
        return ""
    if value < 100:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def slug(text: str) -> str:
    """Letters, digits, _ . and - only: part of a file's name or of a link."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text.replace("%", "pct"))


def headlines(results: Results, task: str) -> list[str]:
    """Who leads on the task's main measure, by how much and how sure; who differs from the baseline; who is fast."""
    measure = results.mains[task]
    ranked = sorted(
        (entry for entry in results.of(task) if measure in entry.scores),
        key=lambda entry: entry.scores[measure].mean * (-1 if better(measure) == "higher" else 1),
    )
    if not ranked:
        return [f"No final run has {measure} yet."]
    found = [_leader(ranked, measure, results.baseline), _verdicts(ranked, measure, results.baseline)]
    return [sentence for sentence in [*found, _times(results.of(task), results.baseline)] if sentence]


def _leader(ranked: Sequence[Entry], measure: str, baseline: str | None) -> str:
    first = ranked[0]
    sentence = f"{first.label} leads with {measure} {_with_interval(first.scores[measure], first)}"
    if measure in first.differences:
        return f"{sentence}. {_apart(first, first.differences[measure])}."
    second = next((entry for entry in ranked[1:] if measure in entry.differences), None)
    if first.method != baseline or second is None:
        return f"{sentence}. There is nothing to compare it with yet."
    other = _apart(second, second.differences[measure])
    return f"{sentence}. It is the baseline. The best other is {second.label}. {other}."


def _with_interval(score: Score, entry: Entry) -> str:
    interval = span(score.low, score.high)
    seeds = f"{len(entry.seeds)} seed{'s' if len(entry.seeds) != 1 else ''}"
    return f"{number(score.mean)} ({f'95 % interval {interval}; ' if interval else ''}{seeds})"


def _apart(entry: Entry, difference: Difference) -> str:
    """How `entry` stands to what it is compared with."""
    interval = span(difference.low, difference.high, signed=True)
    value = number(difference.value, signed=True)
    if not interval:
        return f"Its difference to {difference.to} is {value}, without an interval because rows are missing or differ"
    if difference.verdict == "unclear":
        return (
            f"It cannot be told apart from {difference.to}: the difference is {value}, its interval {interval} holds 0"
        )
    return f"It is {difference.verdict} than {difference.to} by {value}, and the interval {interval} excludes 0"


def _verdicts(ranked: Sequence[Entry], measure: str, baseline: str | None) -> str:
    groups: dict[str, list[Entry]] = {}
    compared = [entry for entry in ranked if measure in entry.differences]
    for entry in compared:
        groups.setdefault(entry.differences[measure].verdict, []).append(entry)
    titles = {"better": "better", "worse": "worse", "unclear": "cannot be told apart"}
    said = [f"{title}: {_listed(groups[verdict], compared)}" for verdict, title in titles.items() if verdict in groups]
    return f"Against {baseline} at the same (or nearest) size — {'; '.join(said)}." if said else ""


def _listed(entries: Sequence[Entry], among: Sequence[Entry]) -> str:
    """`smt (all sizes), lora 2%`: a method once where all of its sizes are meant."""
    words = []
    for method in dict.fromkeys(entry.method for entry in entries):
        mine, every = ([entry for entry in some if entry.method == method] for some in (entries, among))
        whole = len(mine) == len(every) > 1
        words += [f"{method} (all sizes)"] if whole else [entry.label for entry in mine]
    return ", ".join(words)


def _times(entries: Sequence[Entry], baseline: str | None) -> str:
    timed = [(e, e.time_to) for e in entries if e.time_to is not None and e.method != baseline]
    reached = sorted(((t.ratio, e.label) for e, t in timed if t.ratio is not None))
    never = [entry for entry, t in timed if t.seconds is None]
    if not timed:
        return ""
    words = [f"{label} in {ratio:.2f} of its time" for ratio, label in reached[:3]]
    if never:
        listed = _listed(never, [entry for entry, _ in timed])
        words.append(f"never by {listed}" if words else f"not by {listed}")
    return f"The lowest held-out loss of {baseline} at the same (or nearest) size is reached: {'; '.join(words)}."


def caveats(results: Results, *, planned: tuple[int, int] | None = None) -> list[str]:
    """How far the study is, what failed, which measures count, and what would make its conclusions unsure.

    planned: runs that are over, and runs in all.
    """
    found = []
    if planned is not None:
        done, of = planned
        found.append(f"{done} of {of} runs are over{'; the rest is still to come' if done < of else ''}.")
    if results.failures:
        stages = Counter(failure.stage for failure in results.failures)
        listed = ", ".join(f"{count} {stage}" for stage, count in stages.items())
        found.append(f"{len(results.failures)} of {len(results.records)} runs failed ({listed}); each is listed below.")
    found += [rule.words for rules in results.rules.values() for rule in rules.values()]
    seeds = [len(entry.seeds) for entry in results.entries if entry.seeds]
    if seeds and min(seeds) < FEW_SEEDS:
        many = f"{min(seeds)} to {max(seeds)}" if min(seeds) < max(seeds) else f"{min(seeds)}"
        found.append(
            f"Few seeds ({many}): the intervals hold the chance of the test rows, but too little of the chance between "
            "training runs."
        )
    if sum(bool(entry.differences) for entry in results.entries) > 1:
        found.append("Each interval stands for itself: none is corrected for the number of comparisons.")
    edge = [
        f"{e.label} ({e.task})"
        for e in results.entries
        if e.search is not None and e.search.best and not e.search.interior
    ]
    if edge:
        found.append(
            f"The best learning rate tried lies at the edge for {', '.join(edge)}: a rate beyond may do better."
        )
    return [*found, *results.notes]
