"""Layer ranges: which transformer layers a selector may look at."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..core.errors import ThriftyError

__all__ = ["Layers", "in_layers", "layer_of"]

Layers = int | str | Sequence[int | str] | None
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_END = r"(-?\d+|\d+/[1-9]\d*)?"
_RANGE = re.compile(rf"\s*{_END}\s*:\s*{_END}\s*")


def layer_of(name: str) -> int | None:
    """The layer of a parameter or module: the first number in its dotted name; None outside the layers."""
    found = _NUMBER.search(name)
    return int(found[1]) if found else None


def in_layers(names: Iterable[str], layers: Layers) -> set[str]:
    """Those of `names` that lie in `layers`: a number (-1 is the last), "middle", a range "4:8" as Python slices, one
    by shares, "1/3:2/3" (rounded down), or a list of these; None: all, those outside the layers too.
    ThriftyError for what the model does not have."""
    names = list(names)
    if layers is None:
        return set(names)
    count = 1 + max((layer for name in names if (layer := layer_of(name)) is not None), default=-1)
    wanted: set[int] = set()
    for item in layers if isinstance(layers, Sequence) and not isinstance(layers, str) else [layers]:
        wanted |= _of(item, count)
    return {name for name in names if layer_of(name) in wanted}


def _end(text: str, count: int) -> int:
    whole, _, parts = text.partition("/")
    return int(whole) * count // int(parts) if parts else int(whole)


def _of(item: int | str, count: int) -> set[int]:
    span = f"the model has layers 0 to {count - 1}" if count else "the model has no numbered layers"
    if isinstance(item, str) and (found := _RANGE.fullmatch(item)):
        start, stop = (None if end is None else _end(end, count) for end in found.groups())
        for end in (start, stop):
            if end is not None and not -count <= end <= count:
                raise ThriftyError(f"layers {item!r} reaches outside the model: {span}")
        inside = set(range(count)[start:stop])
        if not inside:
            raise ThriftyError(f"layers {item!r} is empty: {span}")
        return inside
    if item == "middle" and count:
        return {count // 2}
    if isinstance(item, str) and re.fullmatch(r"\s*-?\d+\s*", item):
        item = int(item)
    if isinstance(item, bool) or not isinstance(item, int):
        raise ThriftyError(f"layers {item!r} is not valid: give a number, a range such as '4:8' or '-2:', or a list")
    if not -count <= item < count:
        raise ThriftyError(f"layer {item} lies outside the model: {span}")
    return {item % count}
