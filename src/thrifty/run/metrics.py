"""`metrics.jsonl`: one line per logging step and per evaluation, in the order of the steps, none twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thrifty.core.files import disk_errors, write_text

__all__ = ["MetricsFile", "read_metrics"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that a killed process cut is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            entries.append(json.loads(line))
    return entries


class MetricsFile:
    """Append-only; made for a run that goes on at `step`, it first forgets what was logged after that step."""

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        kept = [entry for entry in read_metrics(path) if entry["step"] <= step] if path.exists() and step else []
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
