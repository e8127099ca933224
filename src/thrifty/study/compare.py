"""`thrifty compare`: make what a study lacks, and hand back the evidence."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from thrifty.core.errors import ThriftyError, unknown

from .config import Study, load_study
from .engine import run_study
from .gather import read_results
from .measures import check as check_measures
from .plan import check, done_and_planned
from .records import read_records
from .report import write_plots, write_report
from .results import Results
from .table import rich_tables
from .words import caveats, headlines

__all__ = ["compare", "compare_study", "write_evidence"]


def compare(source: str | os.PathLike[str] | Mapping[str, Any], **options: Any) -> Results:
    """Run a study (a file, a folder or a mapping) and return its results; options as for `compare_study`.

    The folder `output_dir` then holds `runs/*.json`, `report.html` and the study as it was run. A study that was
    stopped goes on where it was.
    """
    study = load_study(source)
    compare_study(study, **options)
    return write_evidence(study)


def compare_study(
    study: Study,
    *,
    workers: int = 1,
    threads: int | None = None,
    stop_after: float | None = None,
    only: tuple[str, ...] = (),
    retry_failed: bool = False,
    say: Callable[[str], None] = print,
) -> bool:
    """Check every run's configuration and measures, then make the missing runs. Returns whether none is left."""
    for name, value in (("--workers", workers), ("--threads", threads)):
        if value is not None and value < 1:
            raise ThriftyError(f"{name} must be 1 or more, not {value}")
    for label in only:
        if label not in study.methods:
            raise ThriftyError(f"--only: {unknown('method of this study', label, study.methods)}")
    for name, task in study.tasks.items():
        check_measures(task.measures, where=f"tasks.{name}.measures")
    check(study)
    return run_study(
        study,
        workers=workers,
        threads=threads,
        stop_after=stop_after,
        only=only,
        retry_failed=retry_failed,
        say=say,
    )


def write_evidence(study: Study, *, png: bool = False, console: Console | None = None) -> Results:
    """Print the tables and write the report of what is in the study's folder; with `png`, its plots too.

    ThriftyError where there is no run yet.
    """
    folder = Path(study.output_dir)
    records = read_records(folder)
    there = {record.run_info["method"] for record in records.values()}
    measured = {name for record in records.values() for name in record.train_info.get("measures", {})}
    asked = {
        "main": study.measure if study.measure in measured else None,
        "baseline": study.baseline if study.baseline in there else None,
    }
    results = read_results(folder, **asked)
    console = Console() if console is None else console
    for table in rich_tables(results):
        console.print(table)
    for task in results.tasks:
        for sentence in headlines(results, task):
            console.print(f"{task}: {sentence}", highlight=False, markup=False)
    done_planned = done_and_planned(study, records)
    for sentence in caveats(results, planned=done_planned):
        console.print(sentence, highlight=False, markup=False)
    if find_spec("plotly") is None:
        console.print("no report: it needs plotly (pip install 'thrifty[plots]')", highlight=False, markup=False)
        return results
    console.print(f"report: {write_report(folder, planned=done_planned, **asked)}", highlight=False, soft_wrap=True)
    if png:
        for path in write_plots(folder, **asked):
            console.print(str(path), highlight=False, soft_wrap=True)
    return results
