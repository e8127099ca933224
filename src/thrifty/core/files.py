"""Files that are either whole or absent, whatever stops the process."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import ThriftyError

__all__ = [
    "damage",
    "disk_errors",
    "file_sha256",
    "new_folder",
    "remove_folder",
    "remove_leftovers",
    "sync",
    "write_json",
    "write_text",
]

_PARTIAL = ".partial-"  # never a name that a user or another tool looks for


@contextmanager
def disk_errors(what: str, *, fix: str) -> Iterator[None]:
    """Turn a full or read-only disk into one line: `could not write <what>: <reason>; <fix>`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        kernel = re.search(r"([^:]+) \(os error \d+\)", str(error))  # as safetensors words it
        reason = error.strerror if isinstance(error, OSError) else kernel and kernel[1].strip()
        raise ThriftyError(f"could not write {what}: {reason or error}; {fix}") from error


def sync(path: Path) -> None:
    """Force a file's or a folder's entry to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write `text` so that a reader finds the old file or the new one, never half of it. OSError on a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{_PARTIAL}{path.name}")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_text` of `value` as JSON; floats keep every bit."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def new_folder(final: Path, *, marker: str | None = None) -> Iterator[Path]:
    """A temporary folder beside `final` that takes its name once everything in it is on disk; removed on any error.

    With `marker`, a last file of that name lists the size and SHA-256 of every other one, which `damage` compares.
    """
    partial = final.with_name(f"{_PARTIAL}{final.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        for path in files:
            path.chmod(0o644)  # safetensors leaves its files to their owner alone
            sync(path)
        if marker is not None:
            sums = {str(path.relative_to(partial)): [path.stat().st_size, file_sha256(path)] for path in files}
            write_json(partial / marker, sums)
        sync(partial)
        if final.exists():
            remove_folder(final)
        os.rename(partial, final)
        sync(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Remove `folder`; it leaves its name at once, so that no one meets it half removed."""
    leaving = folder.with_name(f"{_PARTIAL}old-{folder.name}")
    shutil.rmtree(leaving, ignore_errors=True)
    os.rename(folder, leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes. OSError where it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path, *, marker: str, sums: bool = True) -> str | None:
    """What is wrong with a folder that `new_folder(..., marker=marker)` finished; None where every file is as written.

    `sums`: read every file; without, only their sizes are looked at, which takes no time.
    """
    if not (folder / marker).is_file():
        return f"{marker} is missing"
    try:
        written = json.loads((folder / marker).read_text(encoding="utf-8"))
        for name, (size, sha256) in written.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            if sums and file_sha256(path) != sha256:
                return f"{name} does not have the bytes that were written"
    except OSError as error:
        return f"{error.filename or marker} cannot be read: {error.strerror}"
    except (ValueError, TypeError, AttributeError, RecursionError):
        return f"{marker} is not what was written"
    return None


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written directly in `folder`."""
    for path in folder.glob(f"{_PARTIAL}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
