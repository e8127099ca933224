"""Where rows come from: files and hub data sets, their weights, and the order in which they are mixed."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from thrifty.core.errors import ThriftyError, unknown
from thrifty.data.readers import Row, read_rows
from thrifty.data.shapes import FIELDS, Example, to_example

__all__ = ["Source", "examples_in", "load"]


@dataclass(frozen=True)
class Source:
    """One source of rows.

    path: a .jsonl, .json, .csv, .tsv, .parquet or .txt file, a folder of them, or a hub id ("owner/name" or
        "owner/name:configuration"). `~` and `$NAME` are expanded.
    split: of a hub id or folder, a split in the form of `datasets` ("train", "train[:90%]"); of a file, only the slice
        ("[:1000]", "[90%:]"; a name before it is allowed and means nothing).
    weight: how often the source is seen in one epoch, relative to reading it once. 1 gives every row once, 3 every row
        three times, 0.25 a quarter of the rows (drawn by the seed, without replacement), 2.5 every row twice and half
        of them a third time.
    columns: {our name: their name}, where the file calls a field otherwise.
    """

    path: str
    split: str | None = None
    weight: float = 1.0
    columns: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weight, (int, float)) or not math.isfinite(self.weight) or self.weight <= 0:
            raise ThriftyError(
                f"{self.path}: weight is {self.weight!r}; it must be a number above 0 (1 is every row once)"
            )
        for ours in self.columns or {}:
            if ours not in FIELDS:
                raise ThriftyError(
                    f"{self.path}: {unknown('field', ours, FIELDS)}; `columns` is {{our field: column in the file}}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults, besides the path."""
        return {
            item.name: getattr(self, item.name) for item in fields(self) if getattr(self, item.name) != item.default
        }


def load(
    sources: Sequence[Source] | Source, *, seed: int, convert: Callable[..., Example] = to_example
) -> list[Example]:
    """All rows of `sources`, each source by its weight; `convert` makes an example of a row.

    One source keeps the order of its file; several are mixed into one order that depends on the seed alone. Every row
    that is not blank becomes an example or an error: a `ThriftyError` for the first broken row, with file, line and
    field, and how many more there are.
    """
    sources = [sources] if isinstance(sources, Source) else list(sources)
    if not sources:
        raise ThriftyError("no data: give data.train a file, a hub id, or a list of {path, split, weight, columns}")
    mixed: list[Example] = []
    for position, source in enumerate(sources):
        examples = _examples(source, convert)
        mixed += _weighted(examples, weight=source.weight, random_=random.Random(f"{seed} source {position}"))
    if len(sources) > 1:
        random.Random(f"{seed} order").shuffle(mixed)
    return mixed


def examples_in(
    source: Source, *, convert: Callable[..., Example] = to_example
) -> tuple[list[Example], list[ThriftyError]]:
    """The rows of one source, each once, and an error for each broken one. ThriftyError where it cannot be read."""
    rows = _sliced(read_rows(source.path, split=source.split), source)
    examples, errors = [], []
    for row in rows:
        if row.whole_file:
            if convert is not to_example:
                raise ThriftyError(f"{source.path}: a plain text has no prompts; give a file of rows")
            if source.columns:
                raise ThriftyError(f"{source.path}: a plain text has no columns; leave `columns` out")
            examples.append(Example(text=row.value["text"], origin=row.origin, row=row.value, whole_file=True))
            continue
        try:
            examples.append(convert(row.value, origin=row.origin, columns=source.columns))
        except ThriftyError as error:
            errors.append(error)
    return examples, errors


def _examples(source: Source, convert: Callable[..., Example]) -> list[Example]:
    examples, errors = examples_in(source, convert=convert)
    if errors:
        rows = len(examples) + len(errors)
        more = f" ({len(errors)} of {rows} rows are broken; this is the first)" if len(errors) > 1 else ""
        raise ThriftyError(f"{errors[0]}{more}") from errors[0]
    return examples


_SLICE = re.compile(r"^\w*\[(-?\d+%?)?:(-?\d+%?)?\]$")


def _sliced(rows: list[Row], source: Source) -> list[Row]:
    """The part of a file's rows that `split` asks for (a hub id's split was already taken where it was read)."""
    if source.split is None or not rows or rows[0].split_taken:
        return rows
    match = _SLICE.match(source.split)
    if match is None or rows[0].whole_file:
        raise ThriftyError(
            f"{source.path}: split {source.split!r} names a part of a hub data set; of a file of rows only a slice "
            "can be taken, such as '[:90%]' or '[1000:]'"
        )

    def bound(text: str | None, default: int) -> int:
        if text is None:
            return default
        return round(len(rows) * int(text[:-1]) / 100) if text.endswith("%") else int(text)

    part = rows[bound(match[1], 0) : bound(match[2], len(rows))]
    if not part:
        raise ThriftyError(f"{source.path}: split {source.split!r} leaves none of its {len(rows)} rows")
    return part


def _weighted(examples: list[Example], *, weight: float, random_: random.Random) -> list[Example]:
    whole, share = int(weight), weight - int(weight)
    chosen = examples * whole
    if share > 0:
        if examples[0].whole_file:
            chosen = chosen + [_part_of(example, share, random_) for example in examples]
        else:
            # At least one row, so that no source that was asked for is absent.
            count = max(round(share * len(examples)), 0 if whole else 1)
            chosen = chosen + [examples[i] for i in sorted(random_.sample(range(len(examples)), count))]
    return chosen


def _part_of(example: Example, share: float, random_: random.Random) -> Example:
    """A share of a plain text: one stretch of it, since windows are cut only when the tokenizer is known."""
    text: Any = example.text
    length = max(1, round(share * len(text)))
    start = random_.randrange(len(text) - length + 1)
    return replace(example, text=text[start : start + length])
