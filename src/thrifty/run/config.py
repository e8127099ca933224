"""RunConfig: everything one run depends on. Frozen dataclasses, from YAML, from `key=value`."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from thrifty.core.budget import Budget
from thrifty.data.source import Source

from .aliases import OWNED
from .yaml_source import apply_overrides, dump_yaml, plain, read_document

__all__ = ["DataConfig", "EvalConfig", "RunConfig", "load_config", "training_fields"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the rows come from. Relative paths are relative to the current directory, as for any command."""

    train: tuple[Source, ...] = ()  # rows to learn from: a path, a source, or a list of both
    eval: tuple[Source, ...] = ()  # rows held out, to measure on


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured on `data.eval` after training (and before, if `before`)."""

    loss: bool = True  # the loss on data.eval, per answer token
    exact_match: int | bool = 0  # rows to answer greedily; 0: none, true: all
    choice: int | bool = 0  # rows to choose an option for; 0: none, true: all
    choices: list[str] | None = None  # the options, where rows name none: [yes, no]
    forgetting: str | None = None  # a plain text file: the loss on it tells what was unlearned
    before: bool = False  # before training too
    batch_size: int = 16  # rows at a time
    max_new_tokens: int | None = None  # None: the longest reference and 16 more


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. `training` holds the fields of transformers.TrainingArguments that were given, under their own names."""

    model: str | dict[str, Any]  # smollm2-135m, a folder or a hub id, or {base: one of these, deltas: [...]}
    tokenizer: str | None = None  # None: the model's own
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # what the weights are held in
    quantize: Literal["int8", "int4", "nf4"] | None = None  # the base's linear layers; what is trained stays in dtype
    trust_remote_code: bool = False  # whether Python code that comes with the model may run
    add_tokens: list[str] | None = None  # new in the tokenizer; their rows are trained beside the method's part
    data: DataConfig = field(default_factory=DataConfig)  # the rows
    method: str | dict[str, Any] = "smt"  # a name, {name: {option: value}}, or a list of parts
    objective: str | dict[str, Any] = "sft"  # {dpo: {...}}, {kto: {...}}, {grpo: {...}}: TRL's options
    budget: Budget | None = None  # a ceiling on trained numbers: 1% or 0.01 of the model's, or a count
    probe_rows: int = 4  # rows in one unit of the probe
    probe_units: int = 16  # units of the probe that chooses what to train
    eval: EvalConfig = field(default_factory=EvalConfig)  # what is measured
    output_dir: str = "out"  # where everything of this run is written
    max_length: int = 1024  # tokens; longer rows are cut, and counted
    packing: bool = False  # rows joined to rows of up to max_length tokens, none of which sees another
    checkpoint_layers: int | None = (
        None  # lowest layers that run again in backward; None: as gradient_checkpointing says
    )
    resume_from_checkpoint: str | None = None  # "auto" or a checkpoint's folder
    allow_changed_data: bool = False  # go on with a stopped run although its data have changed
    early_stopping_patience: int | None = None  # evaluations without improvement
    nonfinite: Literal["stop", "skip"] = "stop"  # what becomes of a step whose loss or gradient is not finite
    report_to: str | list[str] = "none"  # none, tensorboard or trackio
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
    from .reader import Reader  # it builds on this module

    return Reader(document).run(needs_training_data=needs_training_data)


@functools.cache
def training_fields() -> dict[str, Any]:
    """The fields of transformers.TrainingArguments that may be set, and their types."""
    from transformers import TrainingArguments
    from transformers.training_args import OptimizerNames

    ours = {item.name for item in dataclasses.fields(RunConfig)}
    fields = {item.name: item.type for item in dataclasses.fields(TrainingArguments) if item.init}
    fields |= {"fsdp": bool | str | None, "fsdp_config": dict[str, Any] | None}  # transformers types the first as text
    fields["optim"] = Literal["muon"] | OptimizerNames  # ours, and transformers'
    fields["train_sampling_strategy"] = Literal["random", "sequential", "group_by_length"]
    return {name: kind for name, kind in fields.items() if name not in ours and name not in OWNED}
