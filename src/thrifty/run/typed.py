"""A plain value checked against a type annotation."""

from __future__ import annotations

import enum
import math
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from thrifty.core.errors import nearest

__all__ = ["TypeMismatch", "short", "takes_text", "typed"]


class TypeMismatch(Exception):
    """What was expected, as the end of a sentence."""


def typed(value: Any, annotation: Any) -> Any:
    """`value` as `annotation` takes it: integers pass as floats, whole floats as integers; nothing else is converted.

    Understands str, int, float, bool, None, enums (by value), list, dict, Literal and unions. TypeMismatch otherwise.
    """
    if annotation is Any:
        return value
    options = _options(annotation)
    if value is None and type(None) in options:
        return None
    # A union of an enum and str (as in TrainingArguments) takes the enum's names only.
    enums = [option for option in options if isinstance(option, type) and issubclass(option, enum.Enum)]
    if enums:
        options = [option for option in options if option is not str]
    for option in options:
        try:
            return _exactly(value, option)
        except TypeMismatch:
            continue
    hint = ""
    if enums and isinstance(value, str):
        names = [str(member.value) for member in enums[0]]
        names += [str(a) for option in options if typing.get_origin(option) is Literal for a in typing.get_args(option)]
        close = nearest(value, names)
        hint = f"; did you mean {close!r}?" if close else ""
    if isinstance(value, str) and set(options) & {bool} and value.lower() in ("yes", "no", "on", "off"):
        hint = "; write true or false"
    if type(value) in (int, float, bool) and takes_text(annotation):
        hint = f"; put it in quotes: '{value}'"
    raise TypeMismatch(f"{describe(annotation)}, not {short(value)}{hint}")


def takes_text(annotation: Any) -> bool:
    """Whether any text will do."""
    options = _options(annotation)
    return str in options and not any(isinstance(o, type) and issubclass(o, enum.Enum) for o in options)


def _options(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [option for part in typing.get_args(annotation) for option in _options(part)]
    return [type(None) if annotation is None else annotation]


def _exactly(value: Any, option: Any) -> Any:
    origin, arguments = typing.get_origin(option), typing.get_args(option)
    if origin is Literal:
        for allowed in arguments:
            if value == allowed and type(value) is type(allowed):
                return value
    elif option is list or origin is list:
        if isinstance(value, list):
            return [typed(item, arguments[0]) for item in value] if arguments else list(value)
    elif option is dict or origin is dict:
        if isinstance(value, Mapping):
            kind = arguments[1] if arguments else Any
            return {str(key): typed(item, kind) for key, item in value.items()}
    elif isinstance(option, type) and issubclass(option, enum.Enum):
        for member in option:
            if value == member.value or value is member:
                return member.value
    elif option is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return float(value)
    elif option is int:
        if (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and (isinstance(value, int) or math.isfinite(value))
            and value == int(value)
        ):
            return int(value)
    elif isinstance(option, type) and type(value) is option:
        return value
    raise TypeMismatch


def describe(annotation: Any) -> str:
    """A type in words: "a number or null"."""
    words: list[str] = []
    options = _options(annotation)
    has_enum = any(isinstance(option, type) and issubclass(option, enum.Enum) for option in options)
    for option in options:
        if option is str and has_enum:
            continue
        word = _word(option)
        if word not in words:
            words.append(word)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _word(option: Any) -> str:
    origin, arguments = typing.get_origin(option), typing.get_args(option)
    if origin is Literal:
        return " or ".join("true" if a is True else "false" if a is False else repr(a) for a in arguments)
    if option is list or origin is list:
        return f"a list of {_word(arguments[0])}s".replace(" a ", " ") if arguments else "a list"
    if option is dict or origin is dict:
        return "a mapping"
    if isinstance(option, type) and issubclass(option, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in option)
    plain = {str: "a text", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
    return plain.get(option, getattr(option, "__name__", str(option)))


def short(value: Any) -> str:
    """`repr`, cut to what fits in one line of an error."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
