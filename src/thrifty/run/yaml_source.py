"""YAML and `key=value` into plain values that remember where each key was written."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from thrifty.core.errors import ThriftyError

from .typed import short

__all__ = ["Document", "Key", "apply_overrides", "dump_yaml", "flow_yaml", "plain", "read_document"]

Key = tuple[str | int, ...]

_LARGEST = 2**20  # bytes of a file
_MOST = 20_000  # values in it, those that an alias repeats counted each time
_DEEPEST = 40
_NULL, _BOOL, _INT, _FLOAT, _STR = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str"))
# YAML 1.2's scalars, which read as people expect: 1e-3 is a number, `no`, `on` and 12:30 are text. 1_000 is allowed.
_SCALARS = (
    (_NULL, re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    (_BOOL, re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    (_INT, re.compile(r"[-+]?[0-9][0-9_]*"), list("-+0123456789")),
    (
        _FLOAT,
        re.compile(r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)"),
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (the name and type are PyYAML's)


class _Dumper(yaml.SafeDumper):
    # With YAML 1.1's scalars too: what either version would misread is written in quotes.
    yaml_implicit_resolvers = {first: list(v) for first, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _SCALARS:
    _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
    _Loader.add_implicit_resolver(_tag, _whole, _first)
    _Dumper.add_implicit_resolver(_tag, _whole, _first)
_Loader.add_constructor(_INT, lambda loader, node: int(str(node.value).replace("_", "")))


@dataclass
class Document:
    """Plain values, and where each key stands (`run.yaml:7`, `command line`)."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)
    raw: dict[str, str] = field(default_factory=dict)  # dotted key -> what stood on the command line
    name: str = "arguments"

    def place(self, dotted: str) -> str:
        """Where the key, or the nearest mapping around it, was written."""
        key: Key = tuple(int(word) if _is_index(word) else word for word in dotted.split("."))
        for end in range(len(key), 0, -1):
            if key[:end] in self.places:
                return self.places[key[:end]]
        return self.name

    def set(self, dotted: str, value: Any, *, place: str) -> None:
        """Set a dotted key. A mapping replaces what was there; mappings on the way are made where missing."""
        words = dotted.split(".")
        if not all(words):
            raise ThriftyError(f"{place}: {dotted!r} is not a key: write key=value or group.key=value")
        if words[0] == "method" and len(words) > 1:
            # Over `method: smt`, `method.smt.block_size=64` opens the name; `method.full.x=1` names another method.
            current = self.values.get("method")
            if not isinstance(current, dict) or words[1] not in current:
                self.values["method"] = {words[1]: {}}
        target: Any = self.values
        key: Key = ()
        for word in words[:-1]:
            step = _step(target, key, word, place=place)
            key = (*key, step)
            child = target[step] if isinstance(target, list) else target.get(step)
            if child is None:
                child = target[step] = {}
            if not isinstance(child, dict | list):
                raise ThriftyError(f"{place}: cannot set {dotted}: {_dotted(key)} is {short(child)}, not a mapping")
            target = child
        last = _step(target, key, words[-1], place=place)
        target[last] = value
        key = (*key, last)
        self.places = {k: v for k, v in self.places.items() if k[: len(key)] != key}
        self.places[key] = place


def _step(target: Any, key: Key, word: str, *, place: str) -> Any:
    if not isinstance(target, list):
        return word
    if not _is_index(word) or int(word) >= len(target):
        held = f"{len(target)} entries" if len(target) != 1 else "one entry"
        raise ThriftyError(f"{place}: {_dotted(key)} is a list of {held}: no {_dotted((*key, word))} (the first is 0)")
    return int(word)


def _is_index(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) < 9


def _dotted(key: Key) -> str:
    return ".".join(map(str, key))


def read_document(
    source: str | os.PathLike[str] | Mapping[str, Any] | None,
    *,
    start: str = "`thrifty init` writes a run file to start from",
) -> Document:
    """A YAML file's or a mapping's values. ThriftyError for what cannot be read, and for keys given twice; `start`:
    what helps where there is no file yet."""
    if source is None:
        return Document()
    if isinstance(source, Mapping):
        return Document(values=plain(source))
    path = Path(source)
    try:
        if path.stat().st_size > _LARGEST:
            raise ThriftyError(f"{path}: has {path.stat().st_size:,} bytes, more than a run file can: is it data?")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ThriftyError(f"{path}: no such file; {start}") from None
    except IsADirectoryError:
        inside = path / "run.yaml"
        hint = f"; did you mean {inside}?" if inside.is_file() else ""
        raise ThriftyError(f"{path}: is a folder, not a run file{hint}") from None
    except UnicodeDecodeError as error:
        raise ThriftyError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ThriftyError(f"{path}: cannot be read: {error.strerror}") from None
    values, places = _parse(text, name=str(path), numbered=True)
    if values is None:
        raise ThriftyError(f"{path}: the file is empty; {start}")
    if not isinstance(values, dict):
        raise ThriftyError(f"{path}:1: a run file is a mapping of `key: value` lines, not {short(values)}")
    return Document(values=values, places=places, name=str(path))


def apply_overrides(document: Document, overrides: Mapping[str, Any] | Sequence[str]) -> None:
    """`key=value` texts (values read as YAML) or a mapping of dotted keys, over the document, in order."""
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            document.set(str(key), plain(value), place="arguments")
        return
    for text in overrides:
        key, sign, raw = text.partition("=")
        key = key.strip()
        if not sign or not key:
            raise ThriftyError(f"command line: {text!r} is not key=value (such as max_steps=300)")
        if key.startswith("-"):
            raise ThriftyError(f"command line: write {key.lstrip('-').replace('-', '_')}={raw} without dashes")
        place = f"command line: {key}"
        value, _ = _parse(raw, name=place, numbered=False)
        if value is None and raw.strip().lower() not in ("", "~", "null"):
            value = raw  # `run_name=#5`: in YAML a comment, on a command line plainly text
        document.set(key, value, place="command line")
        document.raw[key] = raw


def plain(value: Any) -> Any:
    """Lists, dicts and scalars only: paths become text, tuples lists, anything with `to_dict` its mapping."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    return value


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML that `read_document` reads back equal."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 16)


def flow_yaml(value: Any) -> str:
    """`value` on one line, as it stands behind a key: `{path: a.jsonl, split: '[:-20]'}`."""
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 1 << 16, "default_flow_style": True}
    return yaml.dump({"x": value}, Dumper=_Dumper, **options).removeprefix("{x: ").removesuffix("}\n")


def _parse(text: str, *, name: str, numbered: bool) -> tuple[Any, dict[Key, str]]:
    places: dict[Key, str] = {}
    loader: _Loader | None = None

    def at(mark: yaml.Mark) -> str:
        return f"{name}:{mark.line + 1}" if numbered else name

    def scalar(node: yaml.Node) -> Any:
        assert loader is not None
        try:
            if node.tag in (_NULL, _BOOL, _INT, _FLOAT, _STR):
                return loader.construct_object(node)
        except (ValueError, KeyError):  # `!!int two`, or more digits than Python reads
            pass
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        raise ThriftyError(f"{at(node.start_mark)}: {short(node.value)} is no {kind} that is read here")

    def build(node: yaml.Node, key: Key, around: tuple[int, ...]) -> Any:
        if id(node) in around:
            raise ThriftyError(f"{at(node.start_mark)}: a YAML alias that contains itself")
        around = (*around, id(node))
        if len(around) > _DEEPEST or len(places) > _MOST:
            what = f"nested more than {_DEEPEST} deep" if len(around) > _DEEPEST else f"more than {_MOST:,} values"
            raise ThriftyError(f"{at(node.start_mark)}: {what}, which no run needs")
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                places[(*key, index)] = at(item.start_mark)
            return [build(item, (*key, index), around) for index, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return scalar(node)
        built: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ThriftyError(f"{at(key_node.start_mark)}: a key must be one word, not a list or mapping")
            word = str(key_node.value)
            if word in built:
                first = places[(*key, word)]
                raise ThriftyError(f"{at(key_node.start_mark)}: {word!r} is given twice (first at {first})")
            places[(*key, word)] = at(key_node.start_mark)
            built[word] = build(value_node, (*key, word), around)
        return built

    try:
        loader = _Loader(text)  # looks at the characters already
        node = loader.get_single_node()
        return (None, {}) if node is None else (build(node, (), ()), places)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = at(mark) if mark else name
        raise ThriftyError(f"{where}: not valid YAML: {error.problem or error.context}{_hint(text, mark)}") from None
    except yaml.YAMLError as error:
        raise ThriftyError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ThriftyError(f"{name}: nested too deeply to be read") from None
    finally:
        if loader is not None:
            loader.dispose()


def _hint(text: str, mark: yaml.Mark | None) -> str:
    lines = text.splitlines()
    line = lines[mark.line] if mark is not None and mark.line < len(lines) else ""
    if "\t" in line:
        return "; indent with spaces, not tabs"
    return f" in {short(line.strip())}; put text with special characters in quotes" if line.strip() else ""
