"""What a task measures, read from its `measures` and checked before anything runs."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from thrifty.core.errors import ThriftyError, unknown
from thrifty.data.readers import expand, read_text
from thrifty.run.typed import TypeMismatch, short, typed

from .structured import Structured

__all__ = ["Wanted", "check", "read"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """`measures` of a task. Rows: true for all, n for the first n, false or 0 for none.

    Attributes:
        loss, exact_match, choice: rows.
        choices: the options of rows without their own.
        structured: rows, or {rows, label, fields}.
        forgetting: a plain text file; `~` and `$NAME` are expanded.
        harness: names of lm_eval's tasks. harness_limit: documents of each. harness_path: a folder of more tasks.
    """

    loss: int | bool = False
    exact_match: int | bool = False
    choice: int | bool = False
    choices: list[str] | None = None
    structured: int | bool | dict[str, Any] = False
    forgetting: str | None = None
    harness: list[str] | None = None
    harness_limit: int | None = None
    harness_path: str | None = None

    @property
    def structure(self) -> Structured | None:
        """The options of `structured`, or None where it is not wanted."""
        given = self.structured
        options = Structured(**given) if isinstance(given, dict) else Structured(rows=given)
        return options if options.rows else None


def read(wanted: Mapping[str, Any], *, where: str) -> Wanted:
    """`wanted` with every name and type checked; errors begin with `where` and name the nearest key."""
    found = _filled(Wanted, wanted, where=where, kind="measure")
    if isinstance(found.structured, dict):
        options = _filled(Structured, found.structured, where=f"{where}.structured", kind="option")
        _check_rows(options.rows, f"{where}.structured.rows")
    for name in ("loss", "exact_match", "choice", "structured"):
        _check_rows(getattr(found, name), f"{where}.{name}")
    if found.harness_limit is not None and found.harness_limit < 1:
        raise ThriftyError(f"{where}.harness_limit is {found.harness_limit}: give 1 or more documents, or leave it out")
    for name, needed in (("choices", "choice"), ("harness_limit", "harness"), ("harness_path", "harness")):
        if getattr(found, name) is not None and not getattr(found, needed):
            raise ThriftyError(f"{where}.{name} is for `{needed}`, which is not measured: add it, or leave {name} out")
    return found


def check(wanted: Mapping[str, Any], *, where: str = "measures") -> None:
    """ThriftyError for what could not be measured: unknown measures and options (it names the nearest), wrong types, a
    missing `forgetting` file or `harness_path`, tasks that lm_eval does not know, or no lm_eval.

    where: how errors name the mapping, such as "study.yaml: tasks.snips.measures".
    """
    found = read(wanted, where=where)
    if found.forgetting is not None:
        try:
            read_text(expand(found.forgetting))
        except ThriftyError as error:
            raise ThriftyError(f"{where}.forgetting: {error}") from error
    if found.harness:
        from thrifty.run.harness import harness_tasks

        folder = None if found.harness_path is None else expand(found.harness_path)
        if folder is not None and not Path(folder).is_dir():
            raise ThriftyError(f"{where}.harness_path: there is no folder {found.harness_path!r}")
        harness_tasks(found.harness, folder=folder, where=f"{where}.harness")


def _filled(kind_of: type[T], given: Mapping[str, Any], *, where: str, kind: str) -> T:
    if not isinstance(given, Mapping):
        raise ThriftyError(f"{where} must be a mapping such as {{loss: true}}, not {short(given)}")
    hints = typing.get_type_hints(kind_of)
    values = {}
    for key, value in given.items():
        if key not in hints:
            raise ThriftyError(f"{where}: {unknown(kind, str(key), hints)}")
        try:
            values[key] = typed(value, hints[key])
        except TypeMismatch as mismatch:
            raise ThriftyError(f"{where}.{key} must be {mismatch}") from mismatch
    return kind_of(**values)


def _check_rows(rows: Any, where: str) -> None:
    if isinstance(rows, int) and rows < 0:
        raise ThriftyError(f"{where} is {rows}: give how many of the first rows, or true for all")
