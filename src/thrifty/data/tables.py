"""Rows from Arrow: parquet files, and hub ids or folders through `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thrifty.core.errors import ThriftyError, nearest

__all__ = ["read_hub", "read_parquet"]


def read_parquet(path: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a parquet file with their origins."""
    import pyarrow as arrow  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield _without_nulls_inside(row), f"{path}: row {number}"
    except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ThriftyError(f"{path}: not a readable parquet file ({_first_line(error)})") from error


def read_hub(path: str, *, split: str | None) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a hub id ("owner/name[:configuration]") or a local folder, with their origins."""
    import datasets

    name, _, configuration = path.partition(":")
    folder = Path(path).is_dir()
    if folder:
        name, configuration = path, ""
    try:
        loaded = datasets.load_dataset(name, configuration or None, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        known = (entry.name for entry in Path(path).parent.iterdir()) if Path(path).parent.is_dir() else ()
        close = None if folder else nearest(Path(path).name, known)
        near = f"; did you mean the file {Path(path).parent / close}?" if close else ""
        what = "this folder" if folder else "no such file, and as a hub id it"
        fix = near or ("" if folder else "; give a file, or fetch it where the hub can be reached")
        raise ThriftyError(f"{path}: {what} cannot be loaded ({_first_line(error)}){fix}") from error
    for number, row in enumerate(loaded, start=1):
        yield _without_nulls_inside(row), f"{path}[{split or 'train'}]: row {number}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _without_nulls_inside(row: dict[str, Any]) -> dict[str, Any]:
    """Arrow gives every struct in a column the same keys; those that a row did not have come back as nulls."""
    return {key: _clean(value) for key, value in row.items()}


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_clean(inner) for inner in value]
    return value
