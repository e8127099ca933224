"""Which runs a study is made of, and which of them can be made now."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from thrifty.core.errors import ThriftyError

from .budgets import StudyBudget
from .config import Entry, Range, Study, Task
from .proposals import propose
from .rates import best_rate, rates_to_try
from .records import Record
from .spec import Spec, has_fit, run_config

__all__ = ["Cell", "cells", "check", "done_and_planned", "hopeless", "ready", "specs"]

Records = Mapping[str, Record]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A method at a budget on a task: one search, and one final run for each seed."""

    study: Study
    task: str
    method: str
    budget: StudyBudget

    @property
    def key(self) -> tuple[str, str, str]:
        return self.task, self.method, self.budget.label

    @property
    def entry(self) -> Entry:
        return self.study.methods[self.method]

    @property
    def grid(self) -> list[float] | Range:
        own = self.entry.learning_rate
        return [own] if isinstance(own, float) else own or self.study.search.learning_rate

    def best_rate(self, records: Records) -> float | None:
        """The rate that was given, or the best that was searched."""
        own = self.entry.learning_rate
        return own if isinstance(own, float) else best_rate(self.searched(records))

    def searched(self, records: Records) -> dict[float, float]:
        """Loss on the held-out rows by rate; infinite where the run failed."""
        return {r.run_info["learning_rate"]: _loss(r) for r in self.trials(records)}

    def trials(self, records: Records) -> list[Record]:
        """The search's runs so far, in the order of their making."""
        mine = [r for r in records.values() if r.run_info["stage"] == "search" and _key(r) == self.key]
        return sorted(mine, key=lambda r: (r.run_info.get("trial") or 0, r.run_info["learning_rate"]))

    def spec(self, stage: str, *, rate: float, seed: int, own: Mapping[str, Any], **more: Any) -> Spec:
        """A training run of this cell; `own` are the keys of its stage."""
        study, task, entry = self.study, self.study.tasks[self.task], self.entry
        train, held_out = _split(task)
        config = {**study.run, **task.run, **entry.run, **own}
        config |= {"method": entry.method, "learning_rate": rate, "seed": seed, "data": {"train": train}}
        config |= {"save_strategy": "no", "eval": {"loss": False}}
        given = more.pop("given", None) or self.budget
        if given.fraction is not None or given.count is not None:
            config["budget"] = given.count if given.count is not None else given.fraction
        every = study.curve.every
        if stage == "final" and every:
            config["data"]["eval"] = held_out
            config |= {"eval_strategy": "steps", "eval_steps": every, "logging_steps": every}
        fit_to = config.get("budget")
        if has_fit(entry.method):
            config.pop("budget", None)
        judged = (task.measures, task.eval) if stage == "final" else ({"loss": True}, held_out)
        return Spec(
            stage=stage,
            task=self.task,
            method=self.method,
            budget=self.budget.label,
            word=self.budget.word,
            learning_rate=rate,
            seed=seed,
            config=copy.deepcopy(config),
            measures=judged[0] if stage != "calibrate" else {},
            judged_by=judged[1],
            fit_to=fit_to if has_fit(entry.method) else None,
            **more,
        )


def cells(study: Study) -> list[Cell]:
    """In the order in which they are run."""
    return [
        Cell(study=study, task=task, method=label, budget=budget)
        for task in study.tasks
        for budget in _all_budgets(study)
        for label, entry in study.methods.items()
        if budget in study.budgets_of(entry)
    ]


def _all_budgets(study: Study) -> list[StudyBudget]:
    every = [budget for entry in study.methods.values() for budget in study.budgets_of(entry)]
    return list(dict.fromkeys([*study.budgets, *every]))


def specs(study: Study, records: Records) -> Iterator[Spec]:
    """Every run that is known by now, made or not, in order: the first seed of everything, then the next seed."""
    for name, task in study.tasks.items():
        yield base_spec(study, name, task)
    for seed in study.seeds:
        for cell in cells(study):
            if seed == study.seeds[0]:
                yield from _calibration(cell)
                yield from _search(cell, records)
            yield from _final(cell, records, seed=seed)


def ready(study: Study, records: Records) -> list[Spec]:
    """The runs that can be made now, in order."""
    return [spec for spec in specs(study, records) if spec.name not in records]


def done_and_planned(study: Study, records: Records) -> tuple[int, int]:
    """How many runs are over, and how many there are as far as is known: a grid may yet be widened."""
    known = {spec.name for spec in specs(study, records)}
    finals = {f"final-{c.task}-{c.method}-{c.budget.word}-s{seed}" for c in cells(study) for seed in study.seeds}
    planned = known | finals
    return len(planned & set(records)), len(planned)


def base_spec(study: Study, name: str, task: Task) -> Spec:
    """The model before training."""
    return Spec(
        stage="base",
        task=name,
        method=None,
        budget=None,
        learning_rate=None,
        seed=study.seeds[0],
        config=copy.deepcopy({**study.run, **task.run}),
        measures=task.measures,
        judged_by=task.eval,
    )


def _needs_calibration(cell: Cell) -> bool:
    return cell.budget.size is not None or cell.study.seconds is not None


_CALIBRATION_STEPS = 6


def _calibration(cell: Cell) -> Iterator[Spec]:
    """A few steps, for what a step costs and how large the result is on disk."""
    if not _needs_calibration(cell):
        return
    size = cell.budget.size
    # a number of the result takes some 8 bytes on disk: how many it really takes is what is found out
    given = StudyBudget(cell.budget.label, count=max(2, size // 8)) if size is not None else None
    own = {"max_steps": _CALIBRATION_STEPS}
    yield cell.spec("calibrate", rate=1e-6, seed=cell.study.seeds[0], own=own, given=given)


def _calibrated(cell: Cell, records: Records) -> dict[str, Any] | None:
    """What the calibration says for the cell's runs; None while it has not ended well."""
    if not _needs_calibration(cell):
        return {}
    found = records.get(f"calibrate-{cell.task}-{cell.method}-{cell.budget.word}")
    if found is None or found.failed:
        return None
    info, more = found.train_info, {}
    if cell.budget.size is not None:
        count = int(info["num_trainable_params"] * cell.budget.size / info["file_size"])
        more["given"] = StudyBudget(cell.budget.label, count=max(2, count))
    return more


def _steps(cell: Cell, records: Records) -> dict[str, Any]:
    """How long a final run is, where the study gives seconds."""
    seconds = cell.study.seconds
    if seconds is None:
        return {}
    info = records[f"calibrate-{cell.task}-{cell.method}-{cell.budget.word}"].train_info
    a_step = (info["train_time"] - info["probe_seconds"]) / info["steps"]
    return {"max_steps": max(1, int((seconds - info["probe_seconds"]) / a_step))}


def _search(cell: Cell, records: Records) -> Iterator[Spec]:
    more = _calibrated(cell, records)
    if more is None or isinstance(cell.entry.learning_rate, float):
        return
    own, seed = {**cell.study.search.run}, cell.study.seeds[0]
    search = cell.study.search
    if not search.trials:
        assert isinstance(cell.grid, list)
        for rate in rates_to_try(cell.grid, cell.searched(records), widen=search.widen):
            yield cell.spec("search", rate=rate, seed=seed, own=own, **more)
        return
    trials = cell.trials(records)
    for record in trials:
        yield _trial(cell, record.run_info["learning_rate"], record.run_info.get("proposed_budget"), number=record)
    if len(trials) < search.trials:
        rate, share = propose(search, [(r.run_info, _loss(r)) for r in trials], seed=seed)
        yield _trial(cell, rate, share, number=len(trials))


def _trial(cell: Cell, rate: float, share: float | None, *, number: int | Record) -> Spec:
    """What Optuna proposed as its `number`-th trial."""
    given = None if share is None else StudyBudget(cell.budget.label, fraction=share)
    trial = number if isinstance(number, int) else number.run_info["trial"]
    own = {**cell.study.search.run}
    return cell.spec(
        "search", rate=rate, seed=cell.study.seeds[0], own=own, given=given, trial=trial, proposed_budget=share
    )


def _final(cell: Cell, records: Records, *, seed: int) -> Iterator[Spec]:
    """Once the search is over."""
    more = _calibrated(cell, records)
    if more is None or any(spec.name not in records for spec in _search(cell, records)):
        return
    rate = cell.best_rate(records)
    if rate is None:
        return
    if cell.study.search.budget is not None and (trials := cell.trials(records)):
        best = min(trials, key=_loss)
        more = {"given": StudyBudget(cell.budget.label, fraction=best.run_info["proposed_budget"])}
    yield cell.spec("final", rate=rate, seed=seed, own=_steps(cell, records), seconds=cell.study.seconds, **more)


def hopeless(study: Study, records: Records) -> list[Spec]:
    """Final runs that will never be made, because no run of their search, or their calibration, ended well."""
    found = []
    for cell in cells(study):
        calibrated = _calibrated(cell, records)
        calibration = f"calibrate-{cell.task}-{cell.method}-{cell.budget.word}"
        if calibrated is None and calibration not in records:
            continue
        if calibrated is not None:
            over = all(spec.name in records for spec in _search(cell, records))
            if not over or cell.best_rate(records) is not None:
                continue
        for seed in study.seeds:
            spec = cell.spec("final", rate=1e-6, seed=seed, own={})
            if spec.name not in records:
                found.append(spec)
    return found


def check(study: Study) -> None:
    """Read the configuration of every run: ThriftyError for what any of them would refuse, before the first begins."""
    for cell in cells(study):
        if has_fit(cell.entry.method) and cell.budget.label == "own":
            place = study.place(f"methods.{cell.method}")
            raise ThriftyError(f"{place}: methods.{cell.method}: fit needs a budget to fit, and its budget is own")
        rate = cell.grid.low if isinstance(cell.grid, Range) else cell.grid[0]
        for stage in ("search", "final"):
            own = study.search.run if stage == "search" else {}
            try:
                run_config(cell.spec(stage, rate=rate, seed=study.seeds[0], own=own))
            except ThriftyError as error:
                text = str(error).removeprefix("arguments: ")
                place = study.place(f"methods.{cell.method}")
                raise ThriftyError(f"{place}: method {cell.method} on task {cell.task}: {text}") from None


def _key(record: Record) -> tuple[Any, Any, Any]:
    info = record.run_info
    return info["task"], info["method"], info["budget"]


def _loss(record: Record) -> float:
    loss = math.inf if record.failed else record.score("loss")
    return loss if math.isfinite(loss) else math.inf


_HELD_OUT_SHARE = 5


def _split(task: Task) -> tuple[Any, Any]:
    """The training rows, and those held out of them where the task names none."""
    if task.held_out is not None:
        return task.train, task.held_out
    source = task.train[0] if isinstance(task.train, list) and len(task.train) == 1 else task.train
    source = {"path": source} if isinstance(source, str) else source
    if not isinstance(source, dict) or source.get("split"):
        raise ThriftyError(
            "tasks: where `train` is several files or a part of one, `held_out` must say which of the training rows "
            "are held out for the learning rate and the curves"
        )
    cut = 100 - _HELD_OUT_SHARE
    return {**source, "split": f"[:{cut}%]"}, {**source, "split": f"[{cut}%:]"}
