"""The registry of named methods: built-ins and whatever packages offer under the entry point `thrifty.methods`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeVar

from .errors import ThriftyError, unknown

if TYPE_CHECKING:
    from .method import Method

__all__ = ["MethodRecord", "get", "method", "records"]

_RECORDS: dict[str, MethodRecord] = {}
_loaded: list[bool] = []


@dataclass(frozen=True, kw_only=True)
class MethodRecord:
    """What is known of a named method; `build` makes it from its options, its docstring is the documentation."""

    name: str
    family: str
    paper: str
    build: Callable[..., Method]
    needs_probe: bool
    learning_rate: float  # the default, with AdamW
    cost: str

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.build) or "").split("\n")[0]


_Build = TypeVar("_Build", bound=Callable[..., "Method"])


def method(
    *, family: str, paper: str, learning_rate: float, cost: str, needs_probe: bool = False
) -> Callable[[_Build], _Build]:
    """Decorator: register a function that builds a Method under the function's own name."""

    def register(build: _Build) -> _Build:
        name = build.__name__
        if name in _RECORDS:
            raise ThriftyError(
                f"two methods are called {name!r}: {_RECORDS[name].build.__module__} and {build.__module__}"
            )
        _RECORDS[name] = MethodRecord(
            name=name,
            family=family,
            paper=paper,
            build=build,
            needs_probe=needs_probe,
            learning_rate=learning_rate,
            cost=cost,
        )
        return build

    return register


def records() -> dict[str, MethodRecord]:
    """All methods by name, sorted. Importing an entry point's module must register its methods."""
    if not _loaded:
        _loaded.append(True)
        importlib.import_module("thrifty.catalogue")
        for point in entry_points(group="thrifty.methods"):
            point.load()
    return dict(sorted(_RECORDS.items()))


def get(name: str) -> MethodRecord:
    """The record of `name` (hyphens are accepted); ThriftyError with the nearest name otherwise."""
    known = records()
    key = name.replace("-", "_")
    if key not in known:
        raise ThriftyError(unknown("method", name, known))
    return known[key]
