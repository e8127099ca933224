"""Making a finished run again from its `summary.json`, and what is not as it was then."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thrifty.core.errors import ThriftyError

from .config import RunConfig, load_config
from .provenance import commit, machine
from .summary import versions

__all__ = ["differences", "read_summary", "repeated_config"]

_LARGEST = 64 * 2**20  # bytes; a summary has some thousand


def read_summary(path: str | Path) -> dict[str, Any]:
    """A run's `summary.json`, or that of the run in a folder. ThriftyError for what is none."""
    file = Path(path)
    file = file / "summary.json" if file.is_dir() else file
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError("it is too large")
        summary = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(summary["config"], dict):
            raise TypeError("config is no mapping")
        for key in ("versions", "fingerprints", "files", "machine"):
            summary[key] = dict(summary[key])
    except OSError as error:
        raise ThriftyError(f"{file}: {error.strerror or error}; give the summary.json of a finished run") from None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ThriftyError(
            f"{file} is not the summary of a run, or of one made before they could be repeated "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from None
    return summary


def repeated_config(summary: Mapping[str, Any], overrides: Sequence[str]) -> RunConfig:
    """The configuration of that run, and `key=value` over it. A repeated run starts anew."""
    return load_config({**summary["config"], "resume_from_checkpoint": None}, overrides)


def differences(summary: Mapping[str, Any], config: RunConfig, record: Mapping[str, Any]) -> list[str]:
    """What is not as it was in the run of `summary`, one line each; where a run goes is none of it."""
    was, now = summary["config"], config.to_dict()
    missing = object()
    found = [
        f"{key}: {was.get(key, 'the default')!r} -> {now.get(key, 'the default')!r}"
        for key in [*was, *(key for key in now if key not in was)]
        if was.get(key, missing) != now.get(key, missing) and key not in ("output_dir", "resume_from_checkpoint")
    ]
    for kind, current in (("versions", versions()), ("machine", machine() | {"processes": record["processes"]})):
        then = summary[kind]
        for key in [*then, *(key for key in current if key not in then)]:
            if then.get(key) != current.get(key):
                found.append(f"{key} {then.get(key)} -> {current.get(key)}")
    if summary.get("commit") != commit():
        found.append(f"thrifty's commit {summary.get('commit')} -> {commit()}")
    for key, digest in record["fingerprints"].items():
        if summary["fingerprints"].get(key) != digest:
            then, files = summary["files"].get(key, {}), record["files"].get(key, {})
            changed = [path for path in files if files[path] != then.get(path)]
            named = f" ({', '.join(changed)})" if changed else ""
            found.append(f"the rows of {key}{named}" if key.startswith("data.") else f"the {key}")
    return found
