"""One training step and one evaluation batch of the largest rows: what they need, measured."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from thrifty.data import report_of

from ..arguments import training_arguments
from ..config import RunConfig
from ..display import human_bytes, human_time
from ..model import load_model
from ..new_tokens import grow
from ..objectives import parse_objective
from ..probe_batches import general_rows
from ..provenance import record_of
from ..quantized import quantize_base, whole_on
from ..rows import Rows
from ..stop import Stop
from ..train import train_rows
from ..trainer import Row
from .report import Report
from .rows import Data, Found

__all__ = ["try_step"]

_UNITS = 2  # of the probe: enough for its memory
_NOT_NOW = ("load_best_model_at_end", "save_steps", "num_train_epochs", "eval_delay")


def try_step(
    report: Report, config: RunConfig, data: Data, tokenizer: PreTrainedTokenizerBase, *, ids: Mapping[str, int]
) -> None:
    """Load the model, choose what to train, take a step, evaluate a batch; nothing is kept. `ids`: of new tokens."""
    quiet = Console(quiet=True)
    planned = training_arguments(config)
    with tempfile.TemporaryDirectory(prefix="thrifty-step-") as folder, report.attempt():
        config = _one_step(config, folder=folder, evaluates=bool(data.eval))
        args = training_arguments(config)
        rows = _largest(
            config, data, tokenizer, batch=args.per_device_train_batch_size * args.gradient_accumulation_steps
        )
        rows = replace(rows, eval=_longest(data.eval, args.per_device_eval_batch_size) or None)
        device = whole_on(config, args.device)
        model = load_model(config.model, dtype=config.dtype, trust_remote_code=config.trust_remote_code, device=device)
        new_tokens = grow(model, ids, rows=rows.train, console=quiet)
        record = record_of(config, model=model, rows=rows, processes=args.world_size)
        quantize_base(config, model, device=args.device)
        try:
            with Stop() as stop:
                tuning, trainer = train_rows(
                    config,
                    args,
                    model=model,
                    rows=rows,
                    tokenizer=tokenizer,
                    new_tokens=new_tokens,
                    record=record,
                    checkpoint=None,
                    console=quiet,
                    stop=stop,
                )
        except torch.OutOfMemoryError:
            report.problem(
                f"one step of {args.per_device_train_batch_size} rows does not fit into memory: halve "
                "per_device_train_batch_size and double gradient_accumulation_steps, or set gradient_checkpointing=true"
            )
            return
        seconds = trainer.clock.seconds - tuning.probe_seconds
        loss = next((entry["loss"] for entry in trainer.state.log_history if "loss" in entry), float("nan"))
        longest = max((len(row["input_ids"]) for row in rows.train), default=0)
        report.say(f"one step of the longest rows (up to {longest:,} tokens): {seconds:.2f} s, loss {loss:.4f}")
        if tuning.probe_seconds:
            each = tuning.probe_seconds / _UNITS
            report.say(f"choosing what to train: {each:.2f} s for each unit of the probe")
        for entry in trainer.state.log_history:
            if "eval_loss" in entry:
                report.say(f"one evaluation batch: {entry['seconds']:.2f} s, loss {entry['eval_loss']:.4f}")
        beside = " beside the weights" if args.device.type == "cpu" else ""
        report.say(f"peak memory: {human_bytes(trainer.peak_memory_bytes)}{beside}")
        if planned.max_steps > 0:
            report.say(f"{planned.max_steps} steps of this size: {human_time(planned.max_steps * seconds)} at most")


def _one_step(config: RunConfig, *, folder: str, evaluates: bool) -> RunConfig:
    training = {key: value for key, value in config.training.items() if key not in _NOT_NOW}
    training |= {"max_steps": 1, "save_strategy": "no", "logging_steps": 1, "logging_strategy": "steps"}
    evaluates = evaluates and not parse_objective(config.objective).uses_trl
    training |= {"warmup_steps": 0, "eval_strategy": "steps" if evaluates else "no"}
    training = {**training, "eval_steps": 1} if evaluates else {k: v for k, v in training.items() if k != "eval_steps"}
    return replace(
        config,
        output_dir=folder,
        report_to="none",
        early_stopping_patience=None,
        resume_from_checkpoint=None,
        probe_units=min(config.probe_units, _UNITS),
        training=training,
    )


def _largest(config: RunConfig, data: Data, tokenizer: PreTrainedTokenizerBase, *, batch: int) -> Rows:
    count = len(data.train) if config.packing else batch  # packed rows are nearly all full
    picked = _picked(data.train, count)
    return Rows(
        train=_longest(data.train, count),
        origins=[example.origin for example, _ in picked],
        eval=None,
        examples=[],
        report=report_of([row for _, row in data.train]),
        general=general_rows(config, tokenizer),
        judged=[example.columns for example in data.judged[:batch]],
        rejected=_longest(data.rejected, count),
    )


def _picked(found: Found, count: int) -> Found:
    return sorted(found, key=lambda pair: -len(pair[1].input_ids))[:count]


def _longest(found: Found, count: int) -> list[Row]:
    return [{"input_ids": row.input_ids, "labels": row.labels} for _, row in _picked(found, count)]
