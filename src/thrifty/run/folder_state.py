"""A run's folder when training begins, and what is said of it when the run is stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from thrifty.core.files import disk_errors, remove_leftovers, write_text

from .checkpoint import Checkpoint, checkpoints, remove_later
from .config import RunConfig
from .metrics import MetricsFile
from .provenance import heading
from .summary import versions

__all__ = ["begin_folder", "stopped"]


def begin_folder(
    config: RunConfig, args: TrainingArguments, *, checkpoint: Checkpoint | None, record: Mapping[str, Any]
) -> MetricsFile | None:
    """Make the folder ready for the steps after `checkpoint`; only the main process writes."""
    output = Path(args.output_dir)
    if not args.should_save:
        return None
    with disk_errors(str(output), fix="free space"):
        remove_leftovers(output)
        write_text(output / "run.yaml", heading(record, versions()) + config.to_yaml())
        (output / "summary.json").unlink(missing_ok=True)  # of the shorter run that is now continued
        if checkpoint is None:
            return MetricsFile(output / "metrics.jsonl", step=0)
        remove_later(output, step=checkpoint.step)
        owes = bool(checkpoint.record()["running"].get("evaluate"))
        return MetricsFile(output / "metrics.jsonl", step=checkpoint.step, owes_evaluation=owes)


def stopped(output: Path, *, saves: bool) -> str:
    """What a stopped run leaves."""
    if not saves:
        return "stopped: save_strategy is no, so nothing was kept"
    found = checkpoints(output)
    if not found:
        return "stopped before the first checkpoint: nothing was kept"
    return f"stopped: {found[-1].folder} is whole; resume_from_checkpoint=auto goes on from there"
