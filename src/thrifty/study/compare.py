"""`thrifty compare`: make what a study lacks, and hand back the evidence."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from .config import Study, load_study
from .engine import run_study
from .gather import read_results
from .plan import done_and_planned
from .records import read_records
from .report import write_plots, write_report
from .results import Results
from .table import rich_tables
from .words import caveats, headlines

__all__ = ["compare", "results_of", "write_evidence"]


def compare(source: str | os.PathLike[str] | Mapping[str, Any], **options: Any) -> Results:
    """Run a study (a file, a folder or a mapping) and return its results; options as for `engine.run_study`.

    The folder `output_dir` then holds `runs/*.json`, `report.html` and the study as it was run. A study that was
    stopped goes on where it was.
    """
    study = load_study(source)
    run_study(study, **options)
    return write_evidence(study)


def results_of(study: Study) -> tuple[Results, tuple[int, int]]:
    """What the study's folder says by the study's own measure and baseline, as soon as a run has them; and how many
    runs are over, of how many. ThriftyError where there is no run yet."""
    folder = Path(study.output_dir)
    records = read_records(folder)
    there = {record.run_info["method"] for record in records.values()}
    measured = {name for record in records.values() for name in record.train_info.get("measures", {})}
    results = read_results(
        folder,
        main=study.measure if study.measure in measured else None,
        baseline=study.baseline if study.baseline in there else None,
    )
    return results, done_and_planned(study, records)


def write_evidence(study: Study, *, png: bool = False, console: Console | None = None) -> Results:
    """Print the tables and write the report of what is in the study's folder; with `png`, its plots too.

    ThriftyError where there is no run yet.
    """
    folder = Path(study.output_dir)
    results, planned = results_of(study)
    console = Console() if console is None else console
    for table in rich_tables(results):
        console.print(table)
    for task in results.tasks:
        for sentence in headlines(results, task):
            console.print(f"{task}: {sentence}", highlight=False, markup=False)
    for sentence in caveats(results, planned=planned):
        console.print(sentence, highlight=False, markup=False)
    if find_spec("plotly") is None:
        console.print("no report: it needs plotly (pip install 'thrifty[plots]')", highlight=False, markup=False)
        return results
    report = write_report(results, folder, planned=planned)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)
    if png:
        for path in write_plots(results, folder):
            console.print(str(path), highlight=False, soft_wrap=True)
    return results
