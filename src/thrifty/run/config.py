"""RunConfig: everything one run depends on. Frozen dataclasses, from YAML, from `key=value`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from thrifty.core import registry
from thrifty.core.budget import Budget
from thrifty.core.errors import ThriftyError, nearest, unknown
from thrifty.core.method import parse_method
from thrifty.data.source import Source

from .aliases import IN_DATA, OTHER_NAMES, OWNED
from .objectives import parse_objective
from .typed import TypeMismatch, takes_text, typed
from .yaml_source import Document, apply_overrides, dump_yaml, plain, read_document

__all__ = ["DataConfig", "EvalConfig", "RunConfig", "load_config", "training_fields"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the rows come from. Relative paths are relative to the current directory, as for any command."""

    train: tuple[Source, ...] = ()
    eval: tuple[Source, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured on `data.eval` after training (and before, if `before`)."""

    loss: bool = True
    exact_match: int | bool = 0  # rows to answer greedily; 0: none, true: all
    choice: int | bool = 0  # rows to choose an option for; 0: none, true: all
    choices: list[str] | None = None
    forgetting: str | None = None  # a plain text file
    before: bool = False
    batch_size: int = 16
    max_new_tokens: int | None = None  # None: the longest reference and 16 more


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. `training` holds the fields of transformers.TrainingArguments that were given, under their own names."""

    model: str | dict[str, Any]  # a name, or {base: ..., deltas: [...]}
    tokenizer: str | None = None  # None: the model's own
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False
    add_tokens: list[str] | None = None  # new in the tokenizer; their rows are trained beside the method's part
    data: DataConfig = field(default_factory=DataConfig)
    method: str | dict[str, Any] = "smt"
    objective: str | dict[str, Any] = "sft"  # {dpo: {...}}, {kto: {...}}, {grpo: {...}}: TRL's options
    budget: Budget | None = None
    probe_rows: int = 4  # rows in one unit of the probe
    probe_units: int = 16
    eval: EvalConfig = field(default_factory=EvalConfig)
    output_dir: str = "out"
    max_length: int = 1024  # tokens
    packing: bool = False  # rows joined to rows of up to max_length tokens, none of which sees another
    resume_from_checkpoint: str | None = None  # "auto" or a checkpoint's folder
    allow_changed_data: bool = False  # go on with a stopped run although its data have changed
    early_stopping_patience: int | None = None  # evaluations without improvement
    nonfinite: Literal["stop", "skip"] = "stop"  # what becomes of a step whose loss or gradient is not finite
    report_to: str | list[str] = "none"
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """The seed of everything random in the run (TrainingArguments' default where none is given)."""
        return int(self.training.get("seed", 42))

    def to_dict(self) -> dict[str, Any]:
        """The form that `load_config` takes: every key, resolved."""
        out: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name == "data":
                out["data"] = {name: [plain(s) for s in getattr(value, name)] or None for name in ("train", "eval")}
            elif item.name == "eval":
                out["eval"] = dataclasses.asdict(value)
            elif isinstance(value, Budget):
                out["budget"] = value.count if value.count is not None else value.fraction
            elif item.name == "training":
                out.update(sorted(value.items()))
            else:
                out[item.name] = plain(value)
        return out

    def to_yaml(self) -> str:
        """A complete run file that loads back equal."""
        return dump_yaml(self.to_dict())


_MINIMUM = {
    **dict.fromkeys(("probe_rows", "probe_units", "max_length", "early_stopping_patience"), 1),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("eval.batch_size", "eval.max_new_tokens"), 1),
    **dict.fromkeys(("eval.exact_match", "eval.choice", "learning_rate", "weight_decay", "warmup_steps", "seed"), 0),
    **dict.fromkeys(("num_train_epochs", "max_grad_norm", "adam_epsilon"), 0),
}


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any] | None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    needs_training_data: bool = True,
) -> RunConfig:
    """A run file or a mapping, and `key=value` texts (or a mapping of dotted keys) over it.

    ThriftyError, in one line with file and line, for an unknown key, a wrong type, a name from another tool, a key
    given twice, a method or a budget that does not exist, and for what is missing.
    """
    document = read_document(source)
    apply_overrides(document, overrides)
    return _Reader(document).run(needs_training_data=needs_training_data)


@functools.cache
def training_fields() -> dict[str, Any]:
    """The fields of transformers.TrainingArguments that may be set, and their types."""
    from transformers import TrainingArguments

    ours = {item.name for item in dataclasses.fields(RunConfig)}
    fields = {item.name: item.type for item in dataclasses.fields(TrainingArguments) if item.init}
    fields["train_sampling_strategy"] = Literal["random", "sequential", "group_by_length"]
    return {name: kind for name, kind in fields.items() if name not in ours and name not in OWNED}


class _Reader:
    """Checks one document. Every message names the place and the dotted key."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.values = document.values

    def fail(self, key: str, text: str) -> ThriftyError:
        return ThriftyError(f"{self.document.place(key)}: {text}")

    def run(self, *, needs_training_data: bool) -> RunConfig:
        hints = typing.get_type_hints(RunConfig)
        del hints["training"]
        names = {**training_fields(), **hints}
        for key in self.values:
            if key not in names:
                raise self.unknown_key(key, names)
        found: dict[str, Any] = {}
        for key, value in self.values.items():
            if key in hints and key not in ("data", "eval", "method", "objective", "budget"):
                found[key] = self.typed(key, value, hints[key])
        training = {k: self.typed(k, v, names[k]) for k, v in self.values.items() if k not in hints}
        found["data"] = self.data()
        found["eval"] = self.eval(has_rows=bool(found["data"].eval))
        found["method"], method = self.parsed("method", parse_method)
        found["objective"], objective = self.parsed("objective", parse_objective)
        if self.values.get("budget") is not None:
            found["budget"] = self.checked("budget", lambda: Budget.parse(self.values["budget"]))
        if found.get("add_tokens") is not None:
            from .new_tokens import check_tokens  # it loads torch

            self.checked("add_tokens", lambda: check_tokens(found["add_tokens"], method))
        if isinstance(found.get("model"), dict):
            from .model import base_and_deltas  # it loads torch

            self.checked("model", lambda: base_and_deltas(found["model"]))
        self.required(found, needs_training_data=needs_training_data)
        if not found["data"].eval and training.get("eval_strategy", "no") != "no":
            raise self.fail("eval_strategy", "eval_strategy needs data.eval: rows to evaluate on")
        # Each method has its own scale; transformers' default suits only full fine-tuning.
        training.setdefault("learning_rate", registry.get(method.name).learning_rate * objective.rate)
        return RunConfig(**found, training=training)

    def required(self, found: Mapping[str, Any], *, needs_training_data: bool) -> None:
        if not found.get("model"):
            raise self.fail("model", "model is missing: name smollm2-135m, a folder or a hub id (model=smollm2-135m)")
        if needs_training_data and not found["data"].train:
            raise self.fail("data", "data.train is missing: the file to train on (data.train=rows.jsonl)")
        if found.get("early_stopping_patience") and not found["data"].eval:
            raise self.fail("early_stopping_patience", "early_stopping_patience needs data.eval: rows to evaluate on")
        if found.get("resume_from_checkpoint") == "":
            raise self.fail("resume_from_checkpoint", "resume_from_checkpoint is auto or a checkpoint's folder")

    def unknown_key(self, key: str, names: Mapping[str, Any]) -> ThriftyError:
        if key in OWNED:
            return self.fail(key, f"{key} is not to be set: {OWNED[key]}")
        if key in OTHER_NAMES:
            return self.fail(key, f"{key!r} is {OTHER_NAMES[key]}")
        current, known = self.values.get("method"), registry.records()
        mentioned = [current] if isinstance(current, str) else list(current) if isinstance(current, dict) else []
        for record in [known[name] for name in [*mentioned, "smt", *known] if name in known]:
            if key in inspect.signature(record.build).parameters:
                return self.fail(key, f"{key!r} is part of the method: method: {{{record.name}: {{{key}: ...}}}}")
        close = nearest(key, [*names, *OTHER_NAMES])
        if close in OTHER_NAMES:
            return self.fail(key, f"unknown key {key!r}; {close!r} is {OTHER_NAMES[close]}")
        return self.fail(key, unknown("key", key, names))

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
            raise self.fail(key, f"{key} must be a mapping such as {example}, not {value!r}")
        for name in value:
            if name not in names:
                dotted = f"{key}.{name}"
                if key == "data" and name in IN_DATA:
                    raise self.fail(dotted, f"{dotted!r} is called 'data.{IN_DATA[name]}' here")
                raise self.fail(dotted, unknown("key", dotted, [f"{key}.{n}" for n in names]))
        return value

    def data(self) -> DataConfig:
        values = self.mapping("data", ["train", "eval"], example="{train: rows.jsonl, eval: held_out.jsonl}")
        return DataConfig(**{name: self.sources(f"data.{name}", value) for name, value in values.items()})

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
        found = {name: self.typed(f"eval.{name}", value, hints[name]) for name, value in values.items()}
        config = EvalConfig(**found)
        for name in ("exact_match", "choice"):
            if found.get(name) and not has_rows:
                raise self.fail(f"eval.{name}", f"eval.{name} needs data.eval: rows to evaluate on")
        if config.choices is not None and len(set(config.choices)) < 2:
            raise self.fail("eval.choices", "eval.choices must name at least two different options")
        return config

    def parsed(self, name: str, parse: Callable[[Any], T]) -> tuple[Any, T]:
        """A name, or `{name: {option: value}}`, and what `parse` makes of it. An error points to the option."""
        value = self.values.get(name)
        value = getattr(RunConfig, name) if value is None else value
        try:
            return value, parse(value)
        except ThriftyError as error:
            options = next(iter(value.values())) if isinstance(value, dict) and value else None
            pairs = options.items() if isinstance(options, dict) else ()
            named = [key for key, given in pairs if {repr(key), repr(given)} & set(re.findall(r"'[^']*'", str(error)))]
            raise self.fail(".".join([name, *value, *named[:1]] if named else [name]), str(error)) from None

    def checked(self, key: str, make: Callable[[], T]) -> T:
        """What `make` gives; its ThriftyError, with the place of `key`."""
        try:
            return make()
        except ThriftyError as error:
            raise self.fail(key, str(error)) from None
