"""A study's folder: one JSON file per finished run, in the shape of PEFT's method-comparison results."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty.core.errors import ThriftyError
from thrifty.core.files import write_json

__all__ = ["RUNS", "Record", "read_records", "write_record"]

RUNS = "runs"
_LARGEST = 2**28  # bytes of one record; most of it are the rows' measures


@dataclass(frozen=True)
class Record:
    """One file of `runs/`."""

    name: str
    run_info: Mapping[str, Any]
    train_info: Mapping[str, Any]
    meta_info: Mapping[str, Any]

    @property
    def failed(self) -> bool:
        return bool(self.train_info["status"] != "success")

    def score(self, measure: str) -> float:
        """A measure's value; infinite or NaN as the run left it. KeyError where the run did not take it."""
        found = self.train_info["measures"][measure]
        if found.get("rows") is None:
            return float(found["score"])
        above, below = (sum(row[i] for row in found["rows"]) for i in (0, 1))
        return above / below if below else math.nan


def read_records(folder: Path) -> dict[str, Record]:
    """All runs in a study's folder, by name. ThriftyError for a file that is no record."""
    found = {}
    for path in sorted((folder / RUNS).glob("[!.]*.json")):
        try:
            if path.stat().st_size > _LARGEST:
                raise ValueError("it is too large")
            value = json.loads(path.read_text(encoding="utf-8"))
            record = Record(path.stem, *(dict(value[key]) for key in ("run_info", "train_info", "meta_info")))
            record.run_info["stage"], record.train_info["status"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ThriftyError(f"{path} is not the record of a run ({error!r}): move it away") from None
        found[path.stem] = record
    return found


def write_record(folder: Path, name: str, value: Mapping[str, Any]) -> None:
    """The whole file or none."""
    write_json(folder / RUNS / f"{name}.json", value)
