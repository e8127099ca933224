"""The accepted shapes of a row, and the one `Example` that all of them become."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from thrifty.core.errors import ThriftyError, nearest, unknown

__all__ = [
    "FIELDS",
    "Example",
    "answer",
    "named_fields",
    "prompted",
    "shape_of",
    "to_example",
    "with_answer",
]

# In the order in which they are tried: the first whose fields are all filled in decides.
SHAPES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
FIELDS = (*dict.fromkeys(name for names in SHAPES.values() for name in names), "input", "system", "tools", "choices")
FIELDS += ("chosen", "rejected", "label")  # of rows that say which answer is better: `preferences`
ACCEPTED = (
    "accepted: messages | prompt + completion | instruction [+ input] + output | conversations | text; "
    "other column names go in `columns`"
)
ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "observation": "tool"}


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row in the form that encoding reads: either `messages`, or `prompt` and `completion`, or `text`.

    messages: {"role", "content", ...}, at least one of them by the assistant.
    answers_from: index of the first message whose answer is trained (those of a `prompt` are not).
    prompt, completion: plain text that is joined as it is, without a chat template.
    text: a document, all of it trained; with `whole_file` it is a whole text file, to be cut into windows.
    choices: the options that the row offers, for multiple choice.
    origin: "file:line"; row: the row as read.
    """

    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    tools: list[dict[str, Any]] | None = None
    choices: list[str] | None = None
    origin: str = ""
    row: Mapping[str, Any] = field(default_factory=dict, repr=False)
    answers_from: int = 0
    whole_file: bool = False


def to_example(row: Any, *, origin: str, columns: Mapping[str, str] | None = None) -> Example:
    """`row` as an example. Raises `ThriftyError` with `origin`, the field, and what would be accepted."""
    fields = named_fields(row, origin=origin, columns=columns or {})
    shape = _shape_of(fields, origin=origin, preferred=columns or {})
    tools = _tools(fields, origin)
    choices = _choices(fields, origin)
    example = Example(tools=tools, choices=choices, origin=origin, row=row)
    if shape == "text":
        return replace(example, text=_text(fields, "text", origin))
    if shape == "prompt":
        return prompted(fields, example)
    if shape == "instruction":
        request, extra = _text(fields, "instruction", origin), fields.get("input")
        if extra is not None and not isinstance(extra, str):
            raise ThriftyError(f"{origin}: field 'input' is {_kind(extra)}, not text; {ACCEPTED}")
        content = f"{request}\n\n{extra}" if extra and extra.strip() else request
        messages = [_user(content), _assistant(_text(fields, "output", origin))]
    else:
        messages = _messages(fields[shape], name=shape, origin=origin)
    return replace(example, messages=_with_system(messages, fields, origin))


def answer(example: Example) -> str | None:
    """The text of the row's last answer; None for a plain text, or where the answer is only a tool call."""
    if example.messages is not None:
        return next(m["content"] for m in reversed(example.messages) if m["role"] == "assistant") or None
    return example.completion


def with_answer(example: Example, text: str) -> Example:
    """The example with `text` as its last answer, and nothing after it."""
    if example.messages is not None:
        last = max(i for i, m in enumerate(example.messages) if m["role"] == "assistant")
        return replace(example, messages=[*example.messages[:last], _assistant(text)])
    if example.completion is None:
        raise ThriftyError(f"{example.origin}: a plain text row has no answer to choose or to compare with")
    # A completion's leading space belongs to the join with its prompt, whatever the option.
    space = example.completion[: len(example.completion) - len(example.completion.lstrip())]
    return replace(example, completion=space + text.lstrip())


def shape_of(row: Any, *, origin: str = "row", columns: Mapping[str, str] | None = None) -> str:
    """The shape of a row in words, such as `prompt + completion`. ThriftyError where it has none."""
    fields = named_fields(row, origin=origin, columns=columns or {})
    return " + ".join(SHAPES[_shape_of(fields, origin=origin, preferred=columns or {})])


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def named_fields(row: Any, *, origin: str, columns: Mapping[str, str], accepted: str = ACCEPTED) -> dict[str, Any]:
    """The fields of `row`, those in `columns` under our names."""
    if not isinstance(row, Mapping):
        raise ThriftyError(f"{origin}: the row is {_kind(row)}, not an object with named fields; {accepted}")
    for ours, theirs in columns.items():
        if theirs not in row:
            close = nearest(theirs, map(str, row))
            hint = f"; did you mean {close!r}?" if close else f"; the row has {', '.join(map(str, row))}"
            raise ThriftyError(f"{origin}: no column {theirs!r} (columns: {ours} is read from it){hint}")
    taken = set(columns.values())
    return {key: value for key, value in row.items() if key not in taken} | {o: row[t] for o, t in columns.items()}


def _shape_of(fields: Mapping[str, Any], *, origin: str, preferred: Mapping[str, str]) -> str:
    # A shape that the user spelled out in `columns` goes before one that the file happens to have.
    order = sorted(SHAPES, key=lambda shape: not any(name in preferred for name in SHAPES[shape]))
    for shape in order:
        if all(fields.get(name) is not None for name in SHAPES[shape]):
            return shape
    for shape in order:
        if any(name in fields for name in SHAPES[shape]):
            name = next(name for name in SHAPES[shape] if fields.get(name) is None)
            if name not in fields:
                close = nearest(name, map(str, fields))
                hint = f" (its nearest column is {close!r})" if close else ""
                raise ThriftyError(f"{origin}: a row without an answer: no field {name!r}{hint}; {ACCEPTED}")
            raise ThriftyError(f"{origin}: field {name!r} is null; {ACCEPTED}")
    names = ", ".join(map(str, fields)) or "nothing"
    raise ThriftyError(f"{origin}: the row has {names}; {ACCEPTED}")


def _text(fields: Mapping[str, Any], name: str, origin: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise ThriftyError(f"{origin}: field {name!r} is {_kind(value)}, not text; {ACCEPTED}")
    if not value.strip():
        raise ThriftyError(f"{origin}: field {name!r} is empty; fill it in or leave the row out")
    _check_characters(value, name, origin)
    return value


def _check_characters(text: str, name: str, origin: str) -> None:
    """JSON can spell half a character ("\\ud83d" alone), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ThriftyError(
            f"{origin}: field {name!r} holds half a character (a lone surrogate) at {error.start}: mend it"
        ) from error


def prompted(fields: Mapping[str, Any], example: Example, *, name: str = "completion") -> Example:
    """`example` with the prompt and the answer, which is the field `name`: two texts stay plain text; where either is a
    list of messages, both become messages."""
    origin, prompt, completion = example.origin, fields["prompt"], fields[name]
    if isinstance(prompt, str) and isinstance(completion, str):
        if fields.get("system") or example.tools:
            raise ThriftyError(
                f"{origin}: `system` and `tools` need messages; a plain text prompt has no place for them"
            )
        return replace(example, prompt=_text(fields, "prompt", origin), completion=_text(fields, name, origin))
    asked = [_user(prompt)] if isinstance(prompt, str) else _message_list(prompt, name="prompt", origin=origin)
    if isinstance(completion, str):
        answered = [_assistant(_text(fields, name, origin))]
    else:
        answered = _messages(completion, name=name, origin=origin)
    asked = _with_system(asked, fields, origin)
    return replace(example, messages=asked + answered, answers_from=len(asked))


def _with_system(messages: list[dict[str, Any]], fields: Mapping[str, Any], origin: str) -> list[dict[str, Any]]:
    system = fields.get("system")
    if system is None or system == "":
        return messages
    if messages[0]["role"] == "system":
        raise ThriftyError(f"{origin}: both a field 'system' and a system message; keep one of them")
    return [{"role": "system", "content": _text(fields, "system", origin)}, *messages]


def _messages(value: Any, *, name: str, origin: str) -> list[dict[str, Any]]:
    messages = _message_list(value, name=name, origin=origin)
    if not any(message["role"] == "assistant" for message in messages):
        raise ThriftyError(f"{origin}: a row without an answer: no assistant message in {name!r}")
    return messages


def _message_list(value: Any, *, name: str, origin: str) -> list[dict[str, Any]]:
    value = _parsed(value, name=name, origin=origin)
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else _kind(value)
        raise ThriftyError(f'{origin}: field {name!r} is {what}, not a list of {{"role", "content"}} messages')
    return [_message(message, at=f"{name}[{i}]", origin=origin) for i, message in enumerate(value)]


def _message(value: Any, *, at: str, origin: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ThriftyError(f'{origin}: field {at!r} is {_kind(value)}, not a {{"role", "content"}} message')
    key, content_key = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    role, content = value.get(key), value.get(content_key)
    role = _SHAREGPT.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        said = unknown("role", role, (*ROLES, *_SHAREGPT)) if isinstance(role, str) else f"{key!r} is {_kind(role)}"
        raise ThriftyError(f"{origin}: field '{at}.{key}': {said}")
    calls = value.get("tool_calls")
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if content is None and role == "assistant" and calls:
        content = ""
    if not isinstance(content, str):
        raise ThriftyError(f"{origin}: field '{at}.{content_key}' is {_kind(content)}, not text")
    _check_characters(content, f"{at}.{content_key}", origin)
    if role == "assistant" and not content.strip() and not calls:
        raise ThriftyError(f"{origin}: a row without an answer: field '{at}.{content_key}' is empty")
    message = {k: v for k, v in value.items() if v is not None and k not in (key, content_key)}
    if calls:
        message["tool_calls"] = [_call(call, at=f"{at}.tool_calls", origin=origin) for call in calls]
    return {"role": role, "content": content, **message}


def _call(call: Any, *, at: str, origin: str) -> dict[str, Any]:
    """A tool call with its arguments as an object: given as text, templates would write them as JSON a second time."""
    if not isinstance(call, Mapping):
        raise ThriftyError(f"{origin}: field {at!r} holds {_kind(call)}, not an object")
    function = call.get("function", call)
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(arguments, str):
        return dict(call)
    parsed = {**function, "arguments": _parsed(arguments, name=f"{at}.arguments", origin=origin)}
    return {**call, "function": parsed} if "function" in call else parsed


def _parsed(value: Any, *, name: str, origin: str) -> Any:
    """Lists and objects may be written as JSON text, as csv and many parquet files must."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ThriftyError(f"{origin}: field {name!r} is text that is not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise ThriftyError(f"{origin}: field {name!r} is JSON nested too deeply, or with too long a number") from error


def _tools(fields: Mapping[str, Any], origin: str) -> list[dict[str, Any]] | None:
    if not fields.get("tools"):
        return None
    tools = _parsed(fields["tools"], name="tools", origin=origin)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ThriftyError(f"{origin}: field 'tools' is not a list of JSON schemas")
    return tools or None


def _choices(fields: Mapping[str, Any], origin: str) -> list[str] | None:
    value = fields.get("choices")
    if value is None or value == "":
        return None
    value = _parsed(value, name="choices", origin=origin)
    if isinstance(value, Mapping) and "text" in value:  # ARC's and OpenBookQA's {"text": [...], "label": [...]}
        value = value["text"]
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(choice, str) for choice in value):
        raise ThriftyError(f"{origin}: field 'choices' is not a list of at least two texts")
    return value
