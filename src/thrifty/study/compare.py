"""`thrifty compare`: make what a study lacks, and hand back the evidence."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from thrifty.core.errors import ThriftyError, unknown

from .config import Study, load_study
from .engine import run_study
from .measures import check as check_measures
from .plan import check

__all__ = ["compare", "compare_study", "write_evidence"]


def compare(source: str | os.PathLike[str] | Mapping[str, Any], **options: Any) -> Any:
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


def write_evidence(study: Study, *, console: Console | None = None) -> Any:
    """Print the table and write the report of what is in the study's folder."""
    raise NotImplementedError
