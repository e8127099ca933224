"""`thrifty init`: a run file with every key and what it means, for the data and the model given, ready to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thrifty.core.errors import ThriftyError

from .yaml_source import flow_yaml

__all__ = ["init", "run_file"]

_HEAD = """\
# A run of thrifty: `thrifty validate {file}` checks it, `thrifty train {file}` runs it. Keys can be given there too:
# `thrifty train {file} max_steps=50`. Relative paths start from the directory in which the command is run.
"""
_TAIL = "# Every other field of transformers.TrainingArguments can be given here too, under its own name.\n"
_WIDTH = 24  # of `key: value`, before the comment

# Key, value, comment; a group has no value; a key that starts with "#" is left out of the file's values.
_KEYS: tuple[tuple[tuple[str, Any, str], ...], ...] = (
    (
        ("model", "", "smollm2-135m (embedded), a folder, or a hub id of a causal language model"),
        ("tokenizer", None, "null: the model's own; otherwise what `model` takes"),
        ("dtype", "float32", "what the weights are held in: float32, bfloat16 or float16"),
        ("quantize", None, "int8, int4 or nf4: the base's linear layers; what is trained stays in dtype"),
        ("trust_remote_code", False, "true runs Python code that comes with the model"),
        ("add_tokens", None, "new tokens, such as ['<tool>']: their rows are trained too, on top of the budget"),
    ),
    (
        ("data", ..., ".jsonl, .json, .csv, .parquet, .txt, or a hub id"),
        ("  train", "", "a path, or a list of {path: ..., split: ..., weight: ..., columns: ...}"),
        ("  eval", None, "held-out rows, in the same form; null: none"),
    ),
    (
        ("method", "smt", "`thrifty methods` lists all; {smt: {block_size: 64}}, {peft: {peft_type: LORA, r: 8}}"),
        (
            "objective",
            "sft",
            "the next-token loss on answers; or dpo, kto, {grpo: {reward_funcs: [exact_match]}} (TRL)",
        ),
        ("budget", "1%", "at most this share of the model's parameters is trained; an integer is a count"),
        ("probe_rows", 4, "rows in one unit of the probe that chooses what to train"),
        ("probe_units", 16, "units of the probe"),
    ),
    (
        ("max_steps", 300, "optimizer steps; instead: num_train_epochs"),
        (
            "per_device_train_batch_size",
            16,
            "rows in one step (with gradient_accumulation_steps: in one part of a step)",
        ),
        ("gradient_accumulation_steps", 1, "parts of one step"),
        ("# learning_rate", 0.001, "left out: the default of the method"),
        ("lr_scheduler_type", "linear", "how the learning rate falls: linear, cosine, constant, ..."),
        ("warmup_steps", 0.03, "steps in which the learning rate rises; below 1 a share of all steps"),
        ("max_length", 1024, "tokens of a row; longer rows are cut, and counted"),
        ("packing", False, "true: several rows in one of max_length tokens; batch sizes then count those"),
        ("seed", 42, "of everything random"),
        (
            "train_sampling_strategy",
            "random",
            "group_by_length: batches of rows of like length, for less padding",
        ),
        ("bf16", False, "true: compute in bfloat16 over weights in `dtype`"),
        ("gradient_checkpointing", False, "true: less memory, more time"),
        ("checkpoint_layers", None, "the lowest layers alone: thrifty estimate --fit says how few are enough"),
    ),
    (
        ("eval", ..., "each is optional; numbers are rows"),
        ("  loss", True, "loss on data.eval"),
        ("  exact_match", 0, "rows of data.eval answered greedily and compared with the reference; true: all"),
        ("  choice", 0, "rows of data.eval for which the likeliest option is chosen; true: all"),
        ("  choices", None, "the options, where rows name none: [yes, no]"),
        ("  forgetting", None, "a plain text file: the loss on it tells what was unlearned"),
        ("  before", False, "true: measure before training too"),
        ("  batch_size", 16, "rows at a time"),
        ("  max_new_tokens", None, "null: the longest reference and 16 more"),
    ),
    (
        ("output_dir", "out", "where everything of this run is written"),
        (
            "resume_from_checkpoint",
            None,
            "auto: the newest whole checkpoint in output_dir; or the folder of one",
        ),
        ("allow_changed_data", False, "true: go on with a stopped run although its data have changed since"),
        (
            "early_stopping_patience",
            None,
            "stop after so many evaluations without improvement (needs eval_strategy)",
        ),
        ("eval_strategy", "no", "when to measure the loss on data.eval during training: 'no', steps, epoch"),
        ("nonfinite", "stop", "a loss or gradient that is not finite: stop, or skip such steps and count them"),
        ("report_to", "none", "none, tensorboard or trackio"),
    ),
)
_NOT_WITH_TRL = ("train_sampling_strategy",)  # TRL decides which rows meet


def run_file(
    *,
    model: str,
    train: str,
    eval: str | None = None,
    file: str = "run.yaml",
    values: Mapping[str, Any] | None = None,
    why: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The text of a commented run file.

    values: by key (`eval.choice`; `train` and `eval` are those of `data`), over the defaults. why: what stands behind a
    key's comment. notes: told at the top.
    """
    values = {"model": model, "train": train, "eval": eval, **(values or {})}
    left_out = _NOT_WITH_TRL if values.get("objective", "sft") != "sft" else ()
    parts = [_HEAD.format(file=file) + "".join(f"# {' '.join(text.split())}\n" for text in notes)]
    for keys in _KEYS:
        group = keys[0][0] if keys[0][1] is ... else ""
        parts.append("".join(_line(*key, group=group, values=values, why=why or {}, left_out=left_out) for key in keys))
    return "\n".join(parts) + _TAIL


def _line(
    key: str,
    default: Any,
    comment: str,
    *,
    group: str,
    values: Mapping[str, Any],
    why: Mapping[str, str],
    left_out: tuple[str, ...],
) -> str:
    name = key.strip("# ")
    dotted = f"eval.{name}" if group == "eval" and key.startswith(" ") else name
    text = f"{key}:" if default is ... else f"{key}: {flow_yaml(values.get(dotted, default))}"
    text = f"# {text}" if name in left_out else text
    reason = f"; {why[dotted]}" if dotted in why and default is not ... else ""
    return f"{text:{_WIDTH}} # {comment}{reason}\n"


def init(file: str, *, model: str, train: str, eval: str | None = None) -> tuple[Path, list[str]]:
    """Write a run file that suits the data and the model, as far as they can be read. ThriftyError where one is there
    already. Returns its path, and what was looked at or could not be."""
    path = Path(file)
    if path.exists():
        raise ThriftyError(f"{path} exists already: name another file, or remove it first")
    if not path.parent.is_dir():
        raise ThriftyError(f"{path}: the folder {path.parent} does not exist")
    from .suggest import suggest  # it loads transformers

    found = suggest(model=model, train=train, eval=eval)
    notes = [f"Looked at {text}." for text in found.seen] + [f"Not looked at: {text}" for text in found.unseen]
    text = run_file(model=model, train=train, eval=eval, file=file, values=found.values, why=found.why, notes=notes)
    try:
        with path.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise ThriftyError(f"{path} exists already: name another file, or remove it first") from None
    return path, notes
