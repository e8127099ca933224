"""A run file's values checked and made a RunConfig: the first mistake raised, or all of them listed."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from thrifty.core import registry
from thrifty.core.budget import Budget
from thrifty.core.errors import ThriftyError, unknown
from thrifty.core.method import parse_method
from thrifty.data.source import Source

from .aliases import IN_DATA, why_unknown
from .config import DataConfig, EvalConfig, RunConfig, training_fields
from .objectives import parse_objective
from .typed import TypeMismatch, takes_text, typed
from .yaml_source import Document, apply_overrides, read_document

__all__ = ["Reader", "Reading", "read_config"]

T = TypeVar("T")

_MINIMUM = {
    "checkpoint_layers": 0,
    **dict.fromkeys(("probe_rows", "probe_units", "max_length", "early_stopping_patience"), 1),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("eval.batch_size", "eval.max_new_tokens"), 1),
    **dict.fromkeys(("eval.exact_match", "eval.choice", "learning_rate", "weight_decay", "warmup_steps", "seed"), 0),
    **dict.fromkeys(("num_train_epochs", "max_grad_norm", "adam_epsilon"), 0),
}


@dataclass
class Reading:
    """What `read_config` found: every problem in one line, and the keys that they are about."""

    problems: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)  # top-level keys


def read_config(
    source: str | os.PathLike[str] | Mapping[str, Any] | None, overrides: Sequence[str] = ()
) -> tuple[RunConfig, Reading]:
    """`load_config` that goes on after a mistake, to tell all of them at once; what is mistaken has its default (a
    model the empty name). ThriftyError only for a file that cannot be read at all."""
    document, reading = read_document(source), Reading()
    reader = Reader(document, reading)
    for text in overrides:
        with reader.noting(text.partition("=")[0]):
            apply_overrides(document, [text])
    return reader.run(needs_training_data=True), reading


class Reader:
    """Checks one document. Every message names the place and the dotted key."""

    def __init__(self, document: Document, reading: Reading | None = None) -> None:
        self.document = document
        self.values = document.values
        self.reading = reading

    def fail(self, key: str, text: str) -> ThriftyError:
        return ThriftyError(f"{self.document.place(key)}: {text}")

    def note(self, key: str, error: ThriftyError) -> None:
        """Raise it; or, where all problems are asked for, write it down and go on without the key."""
        if self.reading is None:
            raise error
        self.reading.problems.append(str(error))
        self.reading.broken.add(key.split(".")[0])

    @contextmanager
    def noting(self, key: str) -> Iterator[None]:
        try:
            yield
        except ThriftyError as error:
            self.note(key, error)

    def run(self, *, needs_training_data: bool) -> RunConfig:
        hints = typing.get_type_hints(RunConfig)
        del hints["training"]
        names = {**training_fields(), **hints}
        found: dict[str, Any] = {}
        training: dict[str, Any] = {}
        for key, value in self.values.items():
            if key not in names:
                self.note(key, self.fail(key, why_unknown(key, names, method=self.values.get("method"))))
            elif key not in ("data", "eval", "method", "objective", "budget"):
                with self.noting(key):
                    (found if key in hints else training)[key] = self.typed(key, value, names[key])
        found["data"] = self.data()
        found["eval"] = self.eval(has_rows=bool(found["data"].eval))
        found["method"], method = self.parsed("method", parse_method)
        found["objective"], objective = self.parsed("objective", parse_objective)
        if self.values.get("budget") is not None:
            with self.noting("budget"):
                found["budget"] = self.checked("budget", lambda: Budget.parse(self.values["budget"]))
        if found.get("add_tokens") is not None:
            from .new_tokens import check_tokens  # it loads torch

            with self.noting("add_tokens"):
                self.checked("add_tokens", lambda: check_tokens(found["add_tokens"], method))
        if isinstance(found.get("model"), dict):
            from .model import base_and_deltas  # it loads torch

            with self.noting("model"):
                self.checked("model", lambda: base_and_deltas(found["model"]))
        self.required(found, training, needs_training_data=needs_training_data)
        # Each method has its own scale; transformers' default suits only full fine-tuning.
        training.setdefault("learning_rate", registry.get(method.name).learning_rate * objective.rate)
        return RunConfig(**{"model": "", **found}, training=training)

    def required(self, found: Mapping[str, Any], training: Mapping[str, Any], *, needs_training_data: bool) -> None:
        broken = set() if self.reading is None else self.reading.broken
        wanting = {}
        if not found.get("model") and "model" not in broken:
            wanting["model"] = "model is missing: name smollm2-135m, a folder or a hub id (model=smollm2-135m)"
        if needs_training_data and not found["data"].train and "data" not in broken:
            wanting["data"] = "data.train is missing: the file to train on (data.train=rows.jsonl)"
        if found.get("early_stopping_patience") and not found["data"].eval:
            wanting["early_stopping_patience"] = "early_stopping_patience needs data.eval: rows to evaluate on"
        if found.get("resume_from_checkpoint") == "":
            wanting["resume_from_checkpoint"] = "resume_from_checkpoint is auto or a checkpoint's folder"
        if not found["data"].eval and training.get("eval_strategy", "no") != "no":
            wanting["eval_strategy"] = "eval_strategy needs data.eval: rows to evaluate on"
        for key, text in wanting.items():
            self.note(key, self.fail(key, text))

    def typed(self, key: str, value: Any, annotation: Any) -> Any:
        try:
            result = typed(value, annotation)
        except TypeMismatch as mismatch:
            # `run_name=2024` reads as a number, but a shell leaves no way to say that it is text.
            if key in self.document.raw and type(value) in (int, float, bool) and takes_text(annotation):
                return self.document.raw[key]
            raise self.fail(key, f"{key} must be {mismatch}") from None
        low = _MINIMUM.get(key)
        if low is not None and result is not None and result < low:
            raise self.fail(key, f"{key} must be {low} or more, not {result}")
        return result

    def mapping(self, key: str, names: Sequence[str], *, example: str) -> dict[str, Any]:
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.note(key, self.fail(key, f"{key} must be a mapping such as {example}, not {value!r}"))
            return {}
        for name in [name for name in value if name not in names]:
            dotted = f"{key}.{name}"
            close = f"{dotted!r} is called 'data.{IN_DATA[name]}' here" if key == "data" and name in IN_DATA else None
            self.note(key, self.fail(dotted, close or unknown("key", dotted, [f"{key}.{n}" for n in names])))
        return {name: item for name, item in value.items() if name in names}

    def data(self) -> DataConfig:
        values = self.mapping("data", ["train", "eval"], example="{train: rows.jsonl, eval: held_out.jsonl}")
        found = {}
        for name, value in values.items():
            with self.noting("data"):
                found[name] = self.sources(f"data.{name}", value)
        return DataConfig(**found)

    def sources(self, key: str, value: Any) -> tuple[Source, ...]:
        if value is None:
            return ()
        if not isinstance(value, list):
            return (self.source(key, value),)
        if not value:
            raise self.fail(key, f"{key} is an empty list")
        return tuple(self.source(f"{key}.{index}", item) for index, item in enumerate(value))

    def source(self, key: str, value: Any) -> Source:
        if isinstance(value, str) and value:
            return Source(path=value)
        if not isinstance(value, dict):
            raise self.fail(
                key, f"{key} must be a path, {{path: ..., split: ..., weight: ..., columns: ...}} or a list of them"
            )
        kinds = {"path": str, "split": str | None, "weight": float, "columns": dict[str, str] | None}
        for name in value:
            if name not in kinds:
                raise self.fail(f"{key}.{name}", unknown("key", f"{key}.{name}", [f"{key}.{n}" for n in kinds]))
        if not value.get("path"):
            raise self.fail(key, f"{key}.path is missing: a file or a hub id")
        found = {name: self.typed(f"{key}.{name}", item, kinds[name]) for name, item in value.items()}
        return self.checked(key, lambda: Source(**found))

    def eval(self, *, has_rows: bool) -> EvalConfig:
        hints = typing.get_type_hints(EvalConfig)
        values = self.mapping("eval", list(hints), example="{loss: true, exact_match: 200}")
        found = {}
        for name, value in values.items():
            with self.noting("eval"):
                found[name] = self.typed(f"eval.{name}", value, hints[name])
        config = EvalConfig(**found)
        for key in [f"eval.{name}" for name in ("exact_match", "choice") if found.get(name) and not has_rows]:
            self.note("eval", self.fail(key, f"{key} needs data.eval: rows to evaluate on"))
        if config.choices is not None and len(set(config.choices)) < 2:
            self.note("eval", self.fail("eval.choices", "eval.choices must name at least two different options"))
        return config

    def parsed(self, name: str, parse: Callable[[Any], T]) -> tuple[Any, T]:
        """A name, or `{name: {option: value}}`, and what `parse` makes of it. An error points to the option, and where
        it is only noted, the option is left out, or the default takes the place of all."""
        value = self.values.get(name)
        value = getattr(RunConfig, name) if value is None else value
        while True:
            try:
                return value, parse(value)
            except ThriftyError as error:
                options = next(iter(value.values())) if isinstance(value, dict) and value else None
                given = options if isinstance(options, dict) else {}
                quoted = set(re.findall(r"'[^']*'", str(error)))
                named = [key for key in given if {repr(key), repr(given[key])} & quoted][:1]
                self.note(name, self.fail(".".join([name, *value, *named] if named else [name]), str(error)))
                rest = {key: item for key, item in given.items() if key not in named}
                value = {next(iter(value)): rest} if named else getattr(RunConfig, name)

    def checked(self, key: str, make: Callable[[], T]) -> T:
        """What `make` gives; its ThriftyError, with the place of `key`."""
        try:
            return make()
        except ThriftyError as error:
            raise self.fail(key, str(error)) from None
