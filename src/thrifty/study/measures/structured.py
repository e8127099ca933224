"""`structured`: answers that are JSON objects with a label and named values, such as an intent and its slots."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from thrifty.core.errors import ThriftyError
from thrifty.data import Example, answer

from .subject import Found, Subject

__all__ = ["Structured", "measure_structured", "pairs", "parsed", "references", "structured_rows"]


@dataclass(frozen=True, kw_only=True)
class Structured:
    """Options.

    Attributes:
        rows: how many of the first rows; True: all.
        label: the key whose value is the label.
        fields: the key of the object with the named values.
    """

    rows: int | bool = True
    label: str = "intent"
    fields: str = "slots"


def measure_structured(subject: Subject, options: Structured) -> Found:
    """`json_valid`, `<label>_accuracy` and `slot_f1` of the greedy answers. Inside `evaluating`.

    ThriftyError as in `references`.
    """
    wanted = references(subject, options)
    answered = subject.answers(options.rows, name="structured")
    return structured_rows([parsed(one.answer) for one in answered], wanted, options)


def references(subject: Subject, options: Structured) -> list[dict[str, Any]]:
    """The answers of the measured rows. ThriftyError for one that is not such an object, which names the row."""
    examples = subject.first(options.rows, name="structured")
    found = [_reference(example, options) for example in examples]
    if not any(pairs(reference.get(options.fields)) for reference in found):
        raise ThriftyError(
            f"{examples[0].origin}: no answer of the {len(found)} measured rows has a value under {options.fields!r}: "
            "set structured.fields to the key of the object that holds them"
        )
    return found


def structured_rows(
    answers: Sequence[Mapping[str, Any] | None], wanted: Sequence[Mapping[str, Any]], options: Structured
) -> Found:
    """The rows of the three measures, of parsed answers (None: not an object) and references `wanted`.

    - `json_valid`: [1 or 0, 1], whether the answer is an object.
    - `<label>_accuracy`: [1 or 0, 1], whether its label is the reference's.
    - `slot_f1`: [2 tp, 2 tp + fp + fn] over the (name, value) pairs, so that the ratio of the sums is micro F1.
    """
    valid, right, overlap = [], [], []
    for said, reference in zip(answers, wanted, strict=True):
        valid.append([int(said is not None), 1])
        said = said or {}
        same = options.label in said and _text(said[options.label]) == _text(reference[options.label])
        right.append([int(same), 1])
        given, right_ones = pairs(said.get(options.fields)), pairs(reference.get(options.fields))
        overlap.append([2 * (given & right_ones).total(), given.total() + right_ones.total()])
    return {
        "json_valid": {"rows": valid},
        f"{options.label}_accuracy": {"rows": right},
        "slot_f1": {"rows": overlap},
    }


def parsed(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` is, or None."""
    try:
        value = json.loads(text, parse_constant=_refused)
    except (ValueError, RecursionError):  # a model may open more brackets than the parser follows
        return None
    return value if isinstance(value, dict) else None


def pairs(fields: Any) -> Counter[tuple[str, str]]:
    """The (name, value) pairs of an object, how often each; none of anything else.

    A list counts each of its elements. Values are compared by their JSON text, with sorted keys: 5 is not "5".
    """
    if not isinstance(fields, Mapping):
        return Counter()
    return Counter(
        (name, _text(element))
        for name, value in fields.items()
        for element in (value if isinstance(value, list) else [value])
    )


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _reference(example: Example, options: Structured) -> dict[str, Any]:
    text = answer(example) or ""
    value = parsed(text)
    if value is None:
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        raise ThriftyError(
            f"{example.origin}: the answer {shown!r} is not a JSON object: leave out `structured`, or the row"
        )
    if options.label not in value:
        has = ", ".join(map(repr, value)) or "none"
        raise ThriftyError(
            f"{example.origin}: the answer has no key {options.label!r} (keys: {has}): set structured.label to one "
            "that all answers have"
        )
    if not isinstance(value.get(options.fields, {}), dict):
        raise ThriftyError(
            f"{example.origin}: {options.fields!r} of the answer is not an object: set structured.fields"
        )
    return value
