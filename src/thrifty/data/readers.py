"""Files to rows: each reader gives dicts with their place in the file, or one `ThriftyError` that names the line."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty.core.errors import ThriftyError, nearest
from thrifty.data.tables import read_hub, read_parquet

__all__ = ["Row", "expand", "read_rows", "read_text"]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(:[\w.-]+)?$")


@dataclass(frozen=True)
class Row:
    """One row as it stands in the source, and where ("file:line", or "file: row 3" where lines mean nothing)."""

    value: Any
    origin: str
    whole_file: bool = False
    split_taken: bool = False


def read_rows(path: str, *, split: str | None = None) -> list[Row]:
    """All rows of a file, folder or hub id. Raises `ThriftyError` where there are none or they cannot be read."""
    path = expand(path)
    file = Path(path)
    if file.is_dir() or (not file.exists() and _is_hub_id(path)):
        rows = [Row(value, origin, split_taken=True) for value, origin in read_hub(path, split=split)]
    else:
        rows = list(_read_file(path))
    if not rows:
        raise ThriftyError(f"{path}: no rows; the file is empty")
    return rows


def expand(path: str) -> str:
    """`path` with `~` and `$NAME` replaced. Raises `ThriftyError` for a variable that is not set."""
    expanded = os.path.expandvars(os.path.expanduser(path))
    missing = re.search(r"\$\{?(\w+)", expanded)
    if missing and not os.path.exists(expanded):
        raise ThriftyError(f"{path}: the environment variable {missing[1]} is not set; set it or write the path out")
    return expanded


def read_text(path: str) -> str:
    """The text of a UTF-8 file without its byte order mark. Raises `ThriftyError`: missing, empty, or not UTF-8."""
    file = Path(path)
    if not file.is_file():
        raise ThriftyError(_missing(path))
    raw = file.read_bytes()
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ThriftyError(f"{path}: this is UTF-16; save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ThriftyError(
            f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}); save it as UTF-8, for instance with "
            "`iconv -f latin1 -t utf-8`"
        ) from error
    if not text.strip():
        raise ThriftyError(f"{path}: no rows; the file is empty")
    return text


def _is_hub_id(path: str) -> bool:
    return bool(_HUB_ID.match(path)) and Path(path.split(":")[0]).suffix.lower() not in SUFFIXES


def _missing(path: str) -> str:
    """The sentence for a file that is not there: the nearest name in its folder, or the folder that is missing."""
    folder = Path(path).parent
    if not folder.is_dir():
        return f"{path}: no such file; the folder {folder} does not exist"
    close = nearest(Path(path).name, (entry.name for entry in folder.iterdir()))
    return f"{path}: no such file" + (f"; did you mean {folder / close}?" if close else f" in {folder.resolve()}")


def _read_file(path: str) -> Iterator[Row]:
    suffix = Path(path).suffix.lower()
    if not Path(path).exists():
        raise ThriftyError(_missing(path))
    if suffix not in SUFFIXES:
        raise ThriftyError(
            f"{path}: unknown kind of file {suffix!r}; known: {', '.join(SUFFIXES)} (unpack archives first)"
        )
    if suffix == ".parquet":
        return (Row(value, origin) for value, origin in read_parquet(path))
    text = read_text(path)
    if suffix == ".txt":
        return iter([Row({"text": text}, path, whole_file=True)])
    if suffix in (".csv", ".tsv"):
        return _read_csv(path, text, delimiter="\t" if suffix == ".tsv" else ",")
    return _read_json(path, text) if suffix == ".json" else _read_jsonl(path, text)


def _read_jsonl(path: str, text: str) -> Iterator[Row]:
    """One JSON value per line; blank lines are no rows."""
    # Not splitlines(): it also splits at U+2028 and others, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield Row(json.loads(line), f"{path}:{number}")
        except json.JSONDecodeError as error:
            whole = line.strip() in ("{", "[") or line.strip() == "[{"
            fix = "the file is one JSON document: name it .json" if whole else "write one JSON object per line"
            raise ThriftyError(f"{path}:{number}: invalid JSON at column {error.colno} ({error.msg}); {fix}") from error
        except (ValueError, RecursionError) as error:
            raise ThriftyError(f"{path}:{number}: {_unreadable(error)}") from error


def _read_json(path: str, text: str) -> Iterator[Row]:
    """A list of rows, an object with one list of rows in it, or (as in many a .json file) one object per line."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _read_jsonl(path, text)
            return
        raise ThriftyError(f"{path}:{error.lineno}: invalid JSON at column {error.colno} ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise ThriftyError(f"{path}: {_unreadable(error)}") from error
    if isinstance(document, dict):
        lists = {key: value for key, value in document.items() if _is_rows(value)}
        if len(lists) == 1 and "messages" not in lists and "conversations" not in lists:
            (key, rows), *_ = lists.items()
            yield from (Row(row, f"{path}: {key}[{index}]") for index, row in enumerate(rows))
            return
        document = [document]
    if not isinstance(document, list):
        raise ThriftyError(f"{path}: holds a JSON {type(document).__name__}; a list of rows is needed")
    yield from (Row(row, f"{path}: row {number}") for number, row in enumerate(document, start=1))


def _unreadable(error: Exception) -> str:
    """Why Python reads no such JSON, valid as it may be."""
    return "nested too deeply" if isinstance(error, RecursionError) else "holds a number of thousands of digits"


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _read_csv(path: str, text: str, *, delimiter: str) -> Iterator[Row]:
    """A header line, then one record per row (quoted line breaks allowed). All values are strings."""
    limit = csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than a long document
    try:
        reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(reader)]
        if len(set(header)) < len(header) or "" in header:
            raise ThriftyError(f"{path}:1: the header has an empty or doubled column name: {header}")
        line = reader.line_num + 1
        for record in reader:
            if record:
                if len(record) != len(header):
                    raise ThriftyError(
                        f"{path}:{line}: {len(record)} values for {len(header)} columns ({', '.join(header)}); "
                        "quote values that hold the separator"
                    )
                yield Row(dict(zip(header, record)), f"{path}:{line}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise ThriftyError(f"{path}:{reader.line_num}: {error}; is a quote left open?") from error
    finally:
        csv.field_size_limit(limit)
