"""From a study's folder to `Results`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.errors import ThriftyError, unknown
from .curves import curve, time_to
from .records import RUNS, Record, read_records
from .results import Costs, Difference, Entry, Failure, Results, Score, SearchResult
from .rule import JUDGE, JUDGED, Rule, majority_rule
from .statistics import Rows, bootstrap, mean, paired_bootstrap, standard_error

__all__ = ["read_results"]

_Key = tuple[str, str, str]  # task, method, budget
_COSTS = {
    "trainable": "num_trainable_params",
    "total": "num_total_params",
    "peak_bytes": "accelerator_memory_max",
    "train_seconds": "train_time",
    "probe_seconds": "probe_seconds",
    "tokens_per_second": "tokens_per_second",
    "file_bytes": "file_size",
}


def read_results(folder: Path, *, main: str | Mapping[str, str] | None = None, baseline: str | None = None) -> Results:
    """Everything that the records in `folder` say, also of a study that is not finished.

    Args:
        main: the main measure, of all tasks or by task; default: the first that the task's runs have. Where it is a
            share of right answers that does not count (`rule.py`), the loss takes its place.
        baseline: the method that others are compared with; default: `lora` where there is one, else the first method.

    ThriftyError for a folder without records, an unknown baseline, and a main measure that no run has.
    """
    records = sorted(read_records(folder).values(), key=lambda r: (r.run_info.get("created_at") or "", r.name))
    if not records:
        raise ThriftyError(f"{folder / RUNS} holds no records of runs: run the study first")
    groups: dict[_Key, list[Record]] = {}
    for record in records:
        if record.run_info["stage"] in ("search", "calibrate", "final"):
            groups.setdefault(_key(record), []).append(record)
    tasks = tuple(dict.fromkeys(record.run_info["task"] for record in records))
    methods = tuple(dict.fromkeys(method for _, method, _ in groups))
    if baseline is not None and baseline not in methods:
        raise ThriftyError(unknown("baseline", baseline, methods))
    if baseline is None and methods:
        baseline = "lora" if "lora" in methods else methods[0]
    finals = {key: _finals(found) for key, found in groups.items()}
    bases = {r.run_info["task"]: r for r in records if r.run_info["stage"] == "base" and _message(r) is None}
    entries = [_entry(key, found, finals[key]) for key, found in groups.items()]
    entries.sort(key=lambda e: (tasks.index(e.task), methods.index(e.method), e.costs.trainable or math.inf))
    base_scores = {task: _scores([record]) for task, record in bases.items()}
    rules = {task: _rules(task, entries, bases.get(task), base_scores.get(task, {})) for task in tasks}
    notes: list[str] = []
    compared = [_compared(entry, entries, finals, bases.get(entry.task), baseline, notes) for entry in entries]
    return Results(
        name=folder.resolve().name,
        tasks=tasks,
        methods=methods,
        baseline=baseline,
        entries=tuple(compared),
        bases=base_scores,
        mains=_mains(
            tasks, main, [r for stage in ("final", "base") for r in records if r.run_info["stage"] == stage], rules
        ),
        rules=rules,
        failures=tuple(
            Failure(name=r.name, stage=r.run_info["stage"], message=message)
            for r in records
            if (message := _message(r)) is not None
        ),
        notes=tuple(dict.fromkeys(notes)),
        records=tuple(records),
    )


def _key(record: Record) -> _Key:
    info = record.run_info
    return info["task"], info["method"], info["budget"]


def _message(record: Record) -> str | None:
    """Why a run failed; one whose result is no finite number did too. None for a success."""
    if record.failed:
        return record.run_info.get("error_msg") or "no message"
    for measure in record.train_info.get("measures", {}):
        if not math.isfinite(value := record.score(measure)):
            return f"its {measure} is {value}"
    return None


def _finals(records: Iterable[Record]) -> dict[int, Record]:
    """The final runs by seed; of two with the same seed, the later one."""
    return {int(r.run_info["seed"]): r for r in records if r.run_info["stage"] == "final"}


def _finished(finals: Mapping[int, Record]) -> dict[int, Record]:
    return {seed: finals[seed] for seed in sorted(finals) if _message(finals[seed]) is None}


def _entry(key: _Key, found: Sequence[Record], finals: Mapping[int, Record]) -> Entry:
    done = _finished(finals)
    metrics = {seed: record.train_info.get("metrics", []) for seed, record in done.items()}
    searched = {
        float(r.run_info["learning_rate"]): math.inf if _message(r) is not None else r.score("loss")
        for r in found
        if r.run_info["stage"] == "search"
    }
    rates = [rate for r in finals.values() if (rate := r.run_info.get("learning_rate")) is not None]
    return Entry(
        task=key[0],
        method=key[1],
        budget=key[2],
        seeds=tuple(done),
        failed={seed: m for seed in sorted(finals) if (m := _message(finals[seed])) is not None},
        scores=_scores(list(done.values())),
        costs=_costs([record.train_info for record in done.values()]),
        learning_rate=rates[-1] if rates else None,
        search=SearchResult(losses=dict(sorted(searched.items()))) if searched else None,
        curves={seed: c for seed, points in metrics.items() if (c := curve(points)).steps},
        train_curves={s: c for s, points in metrics.items() if (c := curve(points, of="train loss")).steps},
        chosen=_chosen([record.train_info.get("chosen") or {} for record in done.values()]),
    )


def _scores(records: Sequence[Record]) -> dict[str, Score]:
    """Each measure's score over the runs that took it."""
    names = dict.fromkeys(name for record in records for name in record.train_info.get("measures", {}))
    scores = {}
    for name in names:
        having = [record for record in records if name in record.train_info["measures"]]
        values = {int(record.run_info["seed"] or 0): record.score(name) for record in having}
        rows = _rows(having, name)
        spread = None if rows is None else bootstrap(rows)
        scores[name] = Score(
            mean=mean(list(values.values())),
            standard_error=standard_error(list(values.values())),
            by_seed=values,
            low=spread.low if spread else None,
            high=spread.high if spread else None,
            error=spread.error if spread else standard_error(list(values.values())),
        )
    return scores


def _rows(records: Sequence[Record], measure: str) -> list[Rows] | None:
    """Each run's rows; None where a run has none, or the runs were measured on different numbers of rows."""
    rows = [record.train_info["measures"][measure].get("rows") for record in records]
    lengths = {len(found) if found else 0 for found in rows}
    return rows if len(lengths) == 1 and 0 not in lengths else None


def _costs(found: Sequence[Mapping[str, Any]]) -> Costs:
    values = {name: [info[key] for info in found if info.get(key) is not None] for name, key in _COSTS.items()}
    return Costs(**{name: mean(numbers) for name, numbers in values.items() if numbers})


def _chosen(found: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, float]:
    """By tensor the share of its numbers that is trained, mean over seeds."""
    names = dict.fromkeys(name for chosen in found for name in chosen)
    return {name: mean([c[name][0] / c[name][1] if name in c else 0.0 for c in found]) for name in names}


def _rules(task: str, entries: Sequence[Entry], base: Record | None, scores: Mapping[str, Score]) -> dict[str, Rule]:
    judges = [entry for entry in entries if entry.task == task and entry.method == JUDGE]
    measured = [name for entry in entries if entry.task == task for name in entry.scores]
    rules = {}
    for measure in dict.fromkeys(name for name in [*scores, *measured] if name in JUDGED):
        best = max((e.scores[measure] for e in judges if measure in e.scores), key=lambda s: s.mean, default=None)
        floor, floor_is = (scores[measure].mean, "the base model") if measure in scores else (None, "")
        if base is not None and (most := base.train_info["measures"].get(measure, {}).get("majority")) is not None:
            floor, floor_is = float(most), "the most frequent answer"
        rules[measure] = majority_rule(
            task=task,
            measure=measure,
            full=best.mean if best else None,
            error=best.error if best else None,
            floor=floor,
            floor_is=floor_is,
        )
    return rules


def _mains(
    tasks: Sequence[str],
    main: str | Mapping[str, str] | None,
    records: Sequence[Record],
    rules: Mapping[str, Mapping[str, Rule]],
) -> dict[str, str]:
    mains = {}
    every = dict.fromkeys(name for r in records for name in r.train_info.get("measures") or {})
    for task in tasks:
        mine = [r for r in records if r.run_info["task"] == task]
        known = dict.fromkeys(name for r in mine for name in r.train_info.get("measures") or {})
        asked = main.get(task) if isinstance(main, Mapping) else main
        if asked is not None and every and asked not in every:
            raise ThriftyError(unknown("measure", asked, every))
        measure = asked if asked is not None and asked in known else next(iter(known), "loss")
        rule = rules[task].get(measure)
        mains[task] = "loss" if rule is not None and rule.counts is False and "loss" in known else measure
    return mains


def _compared(
    entry: Entry,
    entries: Sequence[Entry],
    finals: Mapping[_Key, Mapping[int, Record]],
    base: Record | None,
    baseline: str | None,
    notes: list[str],
) -> Entry:
    """`entry` with its differences to the baseline and to the model before training."""
    mine = _finished(finals[entry.task, entry.method, entry.budget])
    if base is not None and "forgetting" in entry.scores:
        untrained = dict.fromkeys(mine, base)
        entry = replace(
            entry, forgetting=_difference("forgetting", mine, untrained, "the base model", entry.label, notes)
        )
    other = _baseline_of(entry, [e for e in entries if e.task == entry.task and e.method == baseline and e.seeds])
    if other is None:
        return entry
    entry = replace(entry, time_to=time_to(list(entry.curves.values()), list(other.curves.values())))
    if other is entry or entry.method == baseline:
        return entry
    theirs = _finished(finals[other.task, other.method, other.budget])
    found = {name: _difference(name, mine, theirs, other.label, entry.label, notes) for name in entry.scores}
    return replace(entry, differences={name: d for name, d in found.items() if d is not None})


def _baseline_of(entry: Entry, candidates: Sequence[Entry]) -> Entry | None:
    """The baseline at the same budget; else, and for a method of its own size, the nearest in trained parameters."""
    for candidate in candidates:
        if candidate.budget == entry.budget and (entry.budget != "own" or candidate.method == entry.method):
            return candidate
    mine = entry.costs.trainable
    sized = [c for c in candidates if c.costs.trainable]
    if not mine or not sized:
        return None
    return min(sized, key=lambda c: abs(math.log(c.costs.trainable or 1) - math.log(mine)))


def _difference(
    measure: str, mine: Mapping[int, Record], theirs: Mapping[int, Record], to: str, label: str, notes: list[str]
) -> Difference | None:
    """Over the seeds that both took the measure with; None where there are none."""
    having = [{s: r for s, r in side.items() if measure in r.train_info.get("measures", {})} for side in (mine, theirs)]
    seeds = tuple(sorted(set(having[0]) & set(having[1])))
    task = next(iter(mine.values())).run_info["task"] if mine else ""
    if not seeds:
        if mine and theirs:
            notes.append(f"{task}: {label} and {to} have no seed in common for {measure}: no difference is given.")
        return None
    sides = [[side[seed] for seed in seeds] for side in having]
    value = mean([a.score(measure) - b.score(measure) for a, b in zip(*sides)])
    rows = [_rows(side, measure) for side in sides]
    low = high = None
    if rows[0] and rows[1] and len(rows[0][0]) == len(rows[1][0]):
        found = paired_bootstrap(rows[0], rows[1])
        low, high = found.low, found.high
    elif rows[0] or rows[1]:
        notes.append(f"{task}: {label} and {to} were measured on different rows of {measure}: no interval is given.")
    return Difference(to=to, measure=measure, value=value, low=low, high=high, seeds=seeds)
