"""`thrifty estimate`: from a run's configuration to what `predict/` is asked."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlamaConfig

from thrifty.core.budget import Budget
from thrifty.core.errors import ThriftyError
from thrifty.core.method import Method, parse_method
from thrifty.data import pack
from thrifty.predict.cost import Estimate, estimate_job
from thrifty.predict.hardware import Hardware, find_hardware
from thrifty.predict.job import DTYPES, Job
from thrifty.predict.skeleton import build
from thrifty.select.targets import targets

from .arguments import steps_of
from .config import RunConfig, load_config
from .embedded import EMBEDDED, cache_folder
from .model import base_and_deltas, load_tokenizer, resolve
from .objectives import parse_objective
from .order import batch_order
from .rows import load_rows

__all__ = ["compare_job", "estimate", "job_of"]

_ROWS, _ACCUMULATION, _EPOCHS = 8, 1, 3.0  # transformers' own defaults
_SOME_STEPS = 1000  # of a run that says neither its steps nor its data
# what config.json of an embedded model says of its size, so that no wheel has to be fetched
_EMBEDDED_SIZES = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
}


def estimate(
    source: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    hardware: str | None = None,
    price: float | None = None,
    watts: float | None = None,
    **overrides: Any,
) -> Estimate:
    """What the run of a run file or a mapping costs, before it starts: memory, seconds, energy, money.

    Reads the model's config.json alone; with data, their real lengths. `hardware` is a profile's name (`h100`, `cpu`)
    or a YAML file; None: this machine as `thrifty estimate --measure` found it. `price` of an hour, `watts` in place of
    the profile's. `overrides` are the run's keys, as for `train`. ThriftyError for whatever the user can mend.
    """
    config = load_config(source, overrides, needs_training_data=False)
    return estimate_job(job_of(config), find_hardware(hardware), price=price, watts=watts)


def job_of(config: RunConfig, *, read: tuple[list[int], float] | None = None) -> Job:
    """What `config` asks of a machine. ThriftyError for objectives whose steps are not modelled.

    `read`: the lengths of the training rows and the share of tokens with a label, where they are known already.
    """
    objective = parse_objective(config.objective)
    if objective.uses_trl:
        raise ThriftyError(
            f"objective {objective.name!r}: steps of TRL's trainers are not modelled; estimate knows sft alone"
        )
    given = config.training
    rows = int(given.get("per_device_train_batch_size", _ROWS))
    parts = int(given.get("gradient_accumulation_steps", _ACCUMULATION))
    autocast = "bfloat16" if given.get("bf16") else "float16" if given.get("fp16") else None
    asked = bool(config.checkpoint_layers)
    checkpointing = given.get("activation_checkpointing", given.get("gradient_checkpointing", asked))
    method = parse_method(config.method)
    model = _model_config(config)
    lengths, labels = _lengths(config) if read is None else read
    shape = _shape(config, lengths, rows=rows, parts=parts)
    positions = getattr(model.get_text_config(), "max_position_embeddings", None)
    if not lengths and positions is not None:
        shape["length"] = min(shape["length"], positions)
    return Job(
        config=model,
        method=method,
        budget=config.budget,
        rows=min(rows, len(lengths)) if lengths else rows,
        accumulation=parts,
        labels=labels,
        dtype=DTYPES[config.dtype],
        quantize=config.quantize,
        autocast=None if autocast is None else DTYPES[autocast],
        checkpointing=bool(checkpointing),
        checkpoint_layers=config.checkpoint_layers,
        optimizer=_optimizer(config, method),
        probe_rows=config.probe_rows,
        probe_units=config.probe_units,
        trust_remote_code=config.trust_remote_code,
        notes=tuple(_notes(config, has_rows=bool(lengths))),
        **shape,
    )


def _optimizer(config: RunConfig, method: Method) -> str:
    """Its name, as the estimator knows it."""
    steps = steps_of(config, method)
    named = config.training.get("optim") or "adamw_torch_fused"
    return (str(named) if steps is None else type(steps).__name__).lower()


def _notes(config: RunConfig, *, has_rows: bool) -> list[str]:
    notes = []
    if not has_rows:
        notes.append(f"no data: every row as long as max_length ({config.max_length} tokens), each with a label")
        if not _max_steps(config):
            notes.append(f"no data and no max_steps: {_SOME_STEPS:,} steps")
    if config.quantize is not None:
        notes.append(
            f"quantize: weights are counted as {config.quantize} packs them; seconds are those of a base that is not "
            "quantized, and the matrix that each product makes for a moment is not counted"
        )
    if config.add_tokens:
        notes.append("rows of new tokens are not counted")
    if config.eval.before or config.data.eval:
        notes.append("evaluations are not counted")
    return notes


def _max_steps(config: RunConfig) -> int:
    return max(0, int(config.training.get("max_steps", -1)))


def _model_config(config: RunConfig) -> Any:
    """The configuration alone; of an embedded model without its weights."""
    name, _ = base_and_deltas(config.model)
    if name in EMBEDDED and not any((cache_folder() / "models").glob(f"{name}-*")):
        return LlamaConfig(**_EMBEDDED_SIZES[name])
    source = resolve(name)
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ThriftyError(f"model folder {str(folder)!r} has no config.json")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ThriftyError(
            f"model {name!r}: its config.json cannot be read: {' '.join(str(error).split())[:300]}"
        ) from error


def _lengths(config: RunConfig) -> tuple[list[int], float]:
    """Tokens of each training row, and the share of them that have a label; nothing without data."""
    if not config.data.train:
        return [], 1.0
    tokenizer = load_tokenizer(config.tokenizer or config.model, trust_remote_code=config.trust_remote_code)
    rows = load_rows(dataclasses.replace(config, data=dataclasses.replace(config.data, eval=())), tokenizer)
    lengths = [len(row["input_ids"]) for row in rows.train]
    return lengths, rows.report.supervised_tokens / max(1, sum(lengths))


def _shape(config: RunConfig, lengths: Sequence[int], *, rows: int, parts: int) -> dict[str, Any]:
    """Widths of the batches and the number of steps."""
    steps = _max_steps(config)
    if not lengths:
        return {"length": config.max_length, "padded": rows > 1, "steps": steps or _SOME_STEPS}
    seed = int(config.training.get("data_seed") or config.seed)
    if config.packing:
        packed = pack(lengths, capacity=config.max_length, seed=seed)
        lengths = [sum(lengths[row] for row in one) for one in packed]
    strategy = config.training.get("train_sampling_strategy", "random")
    widths = []
    for batch in batch_order(lengths, batch=rows * parts, strategy=strategy, seed=seed, epoch=0):
        widths += [max(lengths[row] for row in batch[i : i + rows]) for i in range(0, len(batch), rows)]
    epochs = float(config.training.get("num_train_epochs", _EPOCHS))
    return {
        "length": max(widths),
        "mean_length": sum(widths) / len(widths),
        "padded": config.packing or (rows > 1 and len(set(lengths)) > 1),
        "steps": steps or max(1, math.ceil(epochs * math.ceil(len(lengths) / (rows * parts)))),
    }


def compare_job(job: Job, hardware: Hardware, **prices: float | None) -> dict[str, Estimate | str]:
    """The configured method, and others that train as many numbers; a text where there is no estimate."""
    first = estimate_job(job, hardware, **prices)
    found: dict[str, Estimate | str] = {f"{first.method} (configured)": first}
    model = build(job)
    parameters = dict(model.named_parameters())
    sizes = [parameters[name].shape[-2:] for name in targets(model, "all-linear")]
    rank = max(1, round(first.trained / sum(sum(shape) for shape in sizes)))
    lora = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    others: dict[str, Any] = {
        "smt": "smt",
        "smt, columns": {"smt": {"block_size": "column", "scope": "per_matrix"}},
        f"LoRA r={rank}": {"peft": lora},
        f"DoRA r={rank}": {"peft": {**lora, "use_dora": True}},
        "lisa": "lisa",
        "hft": "hft",
        "full": "full",
    }
    for name, method in others.items():
        if name == first.method:
            continue
        spends = "smt" in name
        other = dataclasses.replace(
            job, method=parse_method(method), budget=Budget(count=max(2, first.trained)) if spends else None
        )
        try:
            found[name] = estimate_job(other, hardware, **prices)
        except ThriftyError as error:
            found[name] = str(error)
    return found
