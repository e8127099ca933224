"""`metrics.jsonl`: one line per logging step and per evaluation, in the order of the steps, none twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thrifty.core.errors import ThriftyError
from thrifty.core.files import disk_errors, write_text

__all__ = ["MetricsFile", "read_metrics"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that a killed process cut is left out. ThriftyError for a line that
    is none of them."""
    entries = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                entry = json.loads(line)
                entry["step"] + 0
                entries.append(entry)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ThriftyError(f"{path}:{len(entries) + 1}: no line of metrics ({error}): remove it") from None
    return entries


class MetricsFile:
    """Append-only; made for a run that goes on at `step`, it first forgets what was logged after that step, and with
    `owes_evaluation` the evaluation of that step, which is made anew."""

    def __init__(self, path: Path, *, step: int, owes_evaluation: bool = False) -> None:
        self.path = path
        with disk_errors(str(path), fix="free space"):
            kept = [entry for entry in read_metrics(path) if entry["step"] <= step] if path.exists() and step else []
        if owes_evaluation:
            kept = [entry for entry in kept if entry["step"] < step or "eval_loss" not in entry]
        with disk_errors(str(path), fix="free space"):
            write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one line. ThriftyError on a full disk, with the line undone."""
        fix = "free space and go on with resume_from_checkpoint=auto"
        line = (json.dumps(entry) + "\n").encode()
        with disk_errors(str(self.path), fix=fix), open(self.path, "ab", buffering=0) as file:
            before = file.tell()
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(before)
                raise

    def sync(self) -> None:
        """To disk: a checkpoint that follows counts on these lines."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
