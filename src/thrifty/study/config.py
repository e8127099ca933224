"""A study file: what is compared, on what, and what all runs share."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thrifty.core.errors import ThriftyError, unknown
from thrifty.run.typed import TypeMismatch, typed
from thrifty.run.yaml_source import Document, apply_overrides, dump_yaml, read_document

from .budgets import StudyBudget

__all__ = ["Curve", "Entry", "Range", "Search", "Study", "Task", "load_study"]

Sources = str | dict[str, Any] | list[Any]

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+]*\Z")
_NO_KEYS = ("name", "text", "file", "place")  # of a Study: set when its file is read


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows to train on, rows to judge by, and what is measured on these.

    `held_out`: rows of the training data that are neither trained on nor judged by; the learning rate is chosen and the
    curves are drawn on them. None: the last 5 % of `train`, at most 64 rows of its file.
    """

    train: Sources  # as data.train of a run file
    eval: Sources | None = None  # the rows to judge by
    held_out: Sources | None = None  # the rows to search and draw curves by
    measures: dict[str, Any] = field(default_factory=lambda: {"loss": True})  # keys of eval, and more
    run: dict[str, Any] = field(default_factory=dict)  # keys of a run file, over the study's


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One contestant. `learning_rate`: its own grid, or one rate; `budgets`: its own, or `own`: its size."""

    method: str | dict[str, Any] | list[Any]  # as in a run file
    learning_rate: list[float] | float | None = None  # None: as the search says
    budgets: list[StudyBudget] | None = None  # None: the study's
    run: dict[str, Any] = field(default_factory=dict)  # keys of a run file, over the study's and the task's
    note: str = ""  # for the report


@dataclass(frozen=True, kw_only=True)
class Range:
    """Where Optuna looks: from `low` to `high`, on a logarithmic scale."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Search:
    """How each method's learning rate is chosen: the lowest loss on the held-out rows after a short run, first seed.

    A grid is widened at whichever edge the best rate lies, up to `widen` rates beyond each. With `trials`, Optuna
    proposes rates in a range instead, and budgets where `budget` is a range too.
    """

    learning_rate: list[float] | Range = field(default_factory=lambda: [1e-3, 3e-3, 1e-2])
    widen: int = 3
    run: dict[str, Any] = field(default_factory=lambda: {"max_steps": 40})  # keys of a run file, of the short runs
    trials: int = 0  # proposals of Optuna
    budget: Range | None = None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The loss on the held-out rows is measured every so many steps of a final run; 0: never."""

    every: int = 10


@dataclass(frozen=True, kw_only=True)
class Study:
    """A whole study. `run`: what all runs share, keys of a run file."""

    name: str
    run: dict[str, Any]  # keys of a run file
    tasks: dict[str, Task]  # by name
    methods: dict[str, Entry]  # by name; a method as in a run file, or with what else is its own
    budgets: list[StudyBudget]  # 1%, 250000 (numbers), 5MB (of the result on disk), own
    seeds: list[int]  # of the order of the rows, and of what a method draws
    search: Search  # how learning rates are chosen
    curve: Curve  # the loss while training
    baseline: str | None  # the method that the others are compared with
    measure: str | None  # the main one; None: the first of each task
    seconds: float | None  # each final run trains so long, instead of for a number of steps
    output_dir: str  # where the runs' records and the report are written
    text: str  # as it was given, or with what the command line changed
    file: Path | None  # where it was read
    place: Callable[[str], str]  # of a dotted key: "study.yaml:7"

    def budgets_of(self, entry: Entry) -> list[StudyBudget]:
        """What `entry` is run at."""
        return self.budgets if entry.budgets is None else entry.budgets


# What a study sets itself in each run, and where it takes it from.
_SET_BY_STUDY = {
    "method": "methods",
    "budget": "budgets",
    "learning_rate": "search.learning_rate",
    "seed": "seeds",
    "data_seed": "seeds",
    "data": "tasks",
    "eval": "tasks.<name>.measures",
    "output_dir": "output_dir",
    "save_strategy": None,
    "eval_strategy": "curve",
    "eval_steps": "curve.every",
    "resume_from_checkpoint": None,
    "early_stopping_patience": None,
}


def load_study(source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()) -> Study:
    """A study file, the folder of a study, or a mapping, with `key=value` texts over it.

    ThriftyError, in one line with file and line, for unknown keys, wrong types, labels that cannot be part of a file's
    name, and for what is missing. What the runs themselves refuse is found by `plan.check`.
    """
    found: str | os.PathLike[str] | Mapping[str, Any] = source
    if isinstance(source, Mapping):
        name = "study"
    elif Path(source).is_dir() and (Path(source) / "study.yaml").is_file():
        name, found = Path(source).resolve().name, Path(source) / "study.yaml"
        overrides = [f"output_dir={source}", *overrides]
    else:
        name = Path(source).stem
    document = read_document(found, start="docs/compare.md shows a study file to start from")
    apply_overrides(document, overrides)
    reader = _Reader(document, name=name, file=None if isinstance(found, Mapping) else Path(found))
    if reader.file is not None and not overrides:
        reader.text = reader.file.read_text(encoding="utf-8")
    return reader.study()


class _Reader:
    def __init__(self, document: Document, *, name: str, file: Path | None) -> None:
        self.document, self.name, self.file = document, name, file
        self.values = document.values
        self.text = dump_yaml(self.values)

    def fail(self, key: str, text: str) -> ThriftyError:
        return ThriftyError(f"{self.document.place(key)}: {text}")

    def study(self) -> Study:
        known = [item.name for item in dataclasses.fields(Study) if item.name not in _NO_KEYS]
        for key in self.values:
            if key not in known:
                raise self.fail(key, unknown("key of a study", key, known))
        tasks = {label: self.task(label, value) for label, value in self.labelled("tasks").items()}
        methods = {label: self.entry(label, value) for label, value in self.labelled("methods").items()}
        budgets = self.budgets("budgets", self.values.get("budgets", ["1%"]))
        study = Study(
            name=self.name,
            run=self.run("run", self.values.get("run", {})),
            tasks=tasks,
            methods=methods,
            budgets=budgets,
            seeds=self.typed("seeds", self.values.get("seeds", [0]), list[int]),
            search=self.search(),
            curve=Curve(**self.fields("curve", self.values.get("curve", {}), Curve)),
            baseline=self.typed("baseline", self.values.get("baseline"), str | None),
            measure=self.typed("measure", self.values.get("measure"), str | None),
            seconds=self.typed("seconds", self.values.get("seconds"), float | None),
            output_dir=self.typed("output_dir", self.values.get("output_dir", f"studies/{self.name}"), str),
            text=self.text,
            file=self.file,
            place=self.document.place,
        )
        self.check(study)
        return study

    def check(self, study: Study) -> None:
        if not study.seeds or len(set(study.seeds)) < len(study.seeds):
            raise self.fail("seeds", "seeds must be different integers, at least one")
        if study.baseline is not None and study.baseline not in study.methods:
            raise self.fail("baseline", unknown("method of this study", study.baseline, study.methods))
        if study.seconds is not None and study.seconds <= 0:
            raise self.fail("seconds", f"seconds must be above 0, not {study.seconds:g}")
        if study.search.budget is not None and not study.search.trials:
            raise self.fail("search.budget", "search.budget needs search.trials: how many proposals of Optuna to try")
        if study.search.trials and not isinstance(study.search.learning_rate, Range):
            raise self.fail("search", "search.trials needs a range: search.learning_rate: {low: 1e-4, high: 1e-1}")
        if not study.search.trials and isinstance(study.search.learning_rate, Range):
            raise self.fail("search", "a range of learning rates needs search.trials, a number; or give a list")

    def labelled(self, key: str) -> dict[str, Any]:
        """A mapping of labels, which become parts of files' names."""
        value = self.values.get(key)
        if not isinstance(value, dict) or not value:
            raise self.fail(key, f"{key} is missing: a mapping of names, such as {_EXAMPLE[key]}")
        for label in value:
            if not _LABEL.match(label):
                raise self.fail(f"{key}.{label}", f"{key}: {label!r} must be letters, digits, _ . and + only")
        return value

    def fields(self, key: str, value: Any, kind: type) -> dict[str, Any]:
        """The fields of a dataclass, typed."""
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict):
            raise self.fail(key, f"{key} must be a mapping with {', '.join(hints)}")
        for name in value:
            if name not in hints:
                raise self.fail(f"{key}.{name}", unknown("key", f"{key}.{name}", [f"{key}.{hint}" for hint in hints]))
        return {name: self.typed(f"{key}.{name}", item, hints[name]) for name, item in value.items()}

    def typed(self, key: str, value: Any, annotation: Any) -> Any:
        if annotation in (list[StudyBudget] | None, list[StudyBudget]):
            return None if value is None else self.budgets(key, value)
        if annotation in (Range | None, list[float] | Range):
            if value is not None and not isinstance(value, list):
                return self.range(key, value)
            annotation = list[float]
        if annotation is Sources or annotation == (Sources | None):
            return value
        try:
            return typed(value, annotation)
        except TypeMismatch as mismatch:
            raise self.fail(key, f"{key} must be {mismatch}") from None

    def range(self, key: str, value: Any) -> Range:
        if not isinstance(value, dict) or set(value) != {"low", "high"}:
            raise self.fail(key, f"{key} must be {{low: ..., high: ...}}, not {value!r}")
        if key.endswith("budget"):
            found = {name: self.budgets(key, [item])[0].fraction for name, item in value.items()}
            if None in found.values():
                raise self.fail(key, f"{key}: give shares, such as {{low: 0.1%, high: 5%}}")
        else:
            found = {name: self.typed(f"{key}.{name}", item, float) for name, item in value.items()}
        if not 0 < found["low"] < found["high"]:  # type: ignore[operator]
            raise self.fail(key, f"{key}: low must be above 0 and below high")
        return Range(**found)  # type: ignore[arg-type]

    def budgets(self, key: str, value: Any) -> list[StudyBudget]:
        items = value if isinstance(value, list) else [value]
        if not items:
            raise self.fail(key, f"{key} is an empty list")
        try:
            found = [StudyBudget.parse(item) for item in items]
        except ThriftyError as error:
            raise self.fail(key, str(error)) from None
        if len({budget.label for budget in found}) < len(found):
            raise self.fail(key, f"{key} names a budget twice")
        return found

    def run(self, key: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(key, f"{key} must be a mapping of keys of a run file, not {value!r}")
        for name in value:
            if name in _SET_BY_STUDY:
                where = _SET_BY_STUDY[name]
                raise self.fail(f"{key}.{name}", f"{name} is set by the study{f' ({where})' if where else ''}")
        return value

    def task(self, label: str, value: Any) -> Task:
        key = f"tasks.{label}"
        found = self.fields(key, value, Task)
        if not found.get("train"):
            raise self.fail(key, f"{key}.train is missing: the rows to train on")
        if not found.get("eval") and set(found.get("measures", ["loss"])) - {"forgetting", "harness"}:
            raise self.fail(key, f"{key}.eval is missing: the rows to judge by")
        found["run"] = self.run(f"{key}.run", found.get("run", {}))
        return Task(**found)

    def entry(self, label: str, value: Any) -> Entry:
        """A method as in a run file, or `{method: ..., learning_rate: ..., budgets: ..., run: ...}`."""
        key = f"methods.{label}"
        if not (isinstance(value, dict) and "method" in value):
            return Entry(method=value if value is not None else label)
        found = self.fields(key, value, Entry)
        found["run"] = self.run(f"{key}.run", found.get("run", {}))
        return Entry(**found)

    def search(self) -> Search:
        found = self.fields("search", self.values.get("search", {}), Search)
        if "run" in found:
            found["run"] = self.run("search.run", found["run"])
        rates = found.get("learning_rate")
        if isinstance(rates, list) and (not rates or min(rates) <= 0):
            raise self.fail("search.learning_rate", "search.learning_rate: rates above 0, at least one")
        return Search(**found)


_EXAMPLE = {
    "tasks": "{mine: {train: train.jsonl, eval: valid.jsonl, measures: {loss: true, exact_match: 200}}}",
    "methods": "{smt: smt, lora: {peft: {peft_type: LORA, r: fit, lora_alpha: 2*fit}}}",
}
