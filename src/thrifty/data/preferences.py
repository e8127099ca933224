"""Rows that say more than one right answer: pairs (DPO), judged answers (KTO), prompts to answer (GRPO)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from thrifty.core.errors import ThriftyError, nearest
from thrifty.data.shapes import Example, named_fields, prompted, to_example

__all__ = ["CONVERTERS", "Judged", "one_form"]

_LABELS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, kw_only=True)
class Judged(Example):
    """The answer that is to become likelier, if the row has one, and all that a preference trainer reads.

    columns: `{prompt, chosen, rejected}`, `{prompt, completion, label}`, or `{prompt}` with every other field of the
        row, its own `completion` as `reference`; texts, or lists of messages.
    rejected: the answer that is to become less likely.
    """

    columns: Mapping[str, Any] = field(default_factory=dict, repr=False)
    rejected: Example | None = None

    @property
    def answered(self) -> bool:
        """Whether there is an answer to learn from."""
        return self.messages is not None or self.completion is not None


def to_pair(row: Any, *, origin: str, columns: Mapping[str, str] | None = None) -> Judged:
    """A row with `chosen` and `rejected`, and `prompt` unless both are conversations that begin alike."""
    fields = _fields(row, ("chosen", "rejected"), "prompt + chosen + rejected", origin=origin, columns=columns)
    if fields.get("prompt") is None:
        fields = _with_prompt(fields, origin)
    elif isinstance(fields["prompt"], str) and any(isinstance(fields[side], list) for side in ("chosen", "rejected")):
        fields["prompt"] = [{"role": "user", "content": fields["prompt"]}]
    chosen, rejected = (_answered(fields, row, origin, name=side) for side in ("chosen", "rejected"))
    prompt, better = _split(chosen)
    worse = _split(rejected)[1]
    return _judged(chosen, {"prompt": prompt, "chosen": better, "rejected": worse}, rejected=rejected)


def to_judged(row: Any, *, origin: str, columns: Mapping[str, str] | None = None) -> Judged:
    """A row with `prompt`, `completion` and `label`: whether it is a good answer."""
    accepted = "prompt + completion + label"
    fields = _fields(row, ("prompt", "completion", "label"), accepted, origin=origin, columns=columns)
    label = _LABELS.get(str(fields["label"]).lower())
    if label is None:
        raise ThriftyError(f"{origin}: field 'label' is {fields['label']!r}; it must be true (a good answer) or false")
    example = _answered(fields, row, origin, name="completion")
    prompt, completion = _split(example)
    made = {"prompt": prompt, "completion": completion, "label": label}
    if label:
        return _judged(example, made)
    return Judged(origin=origin, row=row, columns=made, rejected=example)


def to_prompt(row: Any, *, origin: str, columns: Mapping[str, str] | None = None) -> Judged:
    """A row with `prompt` and whatever the reward functions read; its `completion`, if any, is a reference answer."""
    fields = _fields(row, ("prompt",), "prompt [+ completion and other columns]", origin=origin, columns=columns)
    others = {name: value for name, value in fields.items() if name not in ("prompt", "completion", "system")}
    if fields.get("completion") is not None:
        example = _answered(fields, row, origin, name="completion")
        prompt, _ = _split(example)
        return _judged(example, {"prompt": prompt, "reference": _text(_split(example)[1]), **others})
    # A stand-in answer checks the prompt, and brings it into its form.
    prompt, _ = _split(_answered({**fields, "completion": "-"}, row, origin, name="completion"))
    return Judged(origin=origin, row=row, columns={"prompt": prompt, **others})


CONVERTERS: dict[str, Callable[..., Example]] = {
    "sft": to_example,
    "dpo": to_pair,
    "kto": to_judged,
    "grpo": to_prompt,
}
"""Objective -> what makes a row of its data an example."""


def one_form(examples: Sequence[Judged]) -> None:
    """ThriftyError where some rows are plain texts and others messages, or their fields differ: a trainer reads all in
    the form of the first."""
    first = examples[0]
    for example in examples:
        for name in first.columns.keys() ^ example.columns.keys():
            lacks, has = (example, first) if name in first.columns else (first, example)
            name = "completion" if name == "reference" else name
            raise ThriftyError(
                f"{lacks.origin}: no field {name!r}, which {has.origin} has: give it in all rows or none"
            )
        if type(example.columns["prompt"]) is not type(first.columns["prompt"]):
            raise ThriftyError(
                f"{example.origin}: plain text and messages are mixed ({first.origin} is otherwise); "
                "write all rows in one form"
            )


def _fields(
    row: Any, needed: Sequence[str], accepted: str, *, origin: str, columns: Mapping[str, str] | None
) -> dict[str, Any]:
    accepted = f"accepted: {accepted}; other column names go in `columns`"
    fields = named_fields(row, origin=origin, columns=columns or {}, accepted=accepted)
    for name in needed:
        if fields.get(name) is None:
            close = None if name in fields else nearest(name, map(str, fields))
            hint = f" (its nearest column is {close!r})" if close else ""
            raise ThriftyError(f"{origin}: {'null in' if name in fields else 'no'} field {name!r}{hint}; {accepted}")
    if fields.get("tools"):
        raise ThriftyError(f"{origin}: field 'tools': only objective: sft takes tools")
    return fields


def _with_prompt(fields: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Two whole conversations: what they begin with alike is the prompt."""
    chosen, rejected = fields["chosen"], fields["rejected"]
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise ThriftyError(
            f"{origin}: no field 'prompt'; only two lists of messages can do without, by what they share"
        )
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    if same == 0 or same == min(len(chosen), len(rejected)):
        raise ThriftyError(f"{origin}: 'chosen' and 'rejected' must begin alike and end with different answers")
    return {**fields, "prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}


def _answered(fields: Mapping[str, Any], row: Any, origin: str, *, name: str) -> Example:
    example = prompted(fields, Example(origin=origin, row=row), name=name)
    if any("tool_calls" in message for message in example.messages or ()):
        raise ThriftyError(f"{origin}: only objective: sft takes tool calls")
    return example


def _split(example: Example) -> tuple[Any, Any]:
    """Prompt and answer: two texts, or two lists of messages."""
    if example.messages is None:
        return example.prompt, example.completion
    return example.messages[: example.answers_from], example.messages[example.answers_from :]


def _text(answer: str | list[dict[str, Any]]) -> str:
    return answer if isinstance(answer, str) else str(answer[-1]["content"])


def _judged(example: Example, columns: Mapping[str, Any], *, rejected: Example | None = None) -> Judged:
    return Judged(
        messages=example.messages,
        prompt=example.prompt,
        completion=example.completion,
        answers_from=example.answers_from,
        origin=example.origin,
        row=example.row,
        columns=columns,
        rejected=rejected,
    )
