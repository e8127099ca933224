"""`summary.json`: what a run trained, what it cost and what it reached."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

import thrifty
from thrifty.data import DataReport

from .config import RunConfig
from .display import human_bytes, human_time
from .yaml_source import plain

if TYPE_CHECKING:
    from thrifty.update.peer import PeerTuning
    from thrifty.update.tuning import Tuning

    from .trainer import ThriftyTrainer

__all__ = [
    "data_fingerprint",
    "delta_info",
    "describe_data",
    "make_summary",
    "model_fingerprint",
    "print_result",
    "versions",
]

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "datasets", "peft", "torchao")


def versions() -> dict[str, str]:
    """Python, thrifty and the packages that decide the numbers; what is not installed is left out."""
    found = {"python": platform.python_version(), "thrifty": thrifty.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def data_fingerprint(rows: Iterable[Mapping[str, Sequence[int]]]) -> str:
    """SHA-256 of all token ids and labels, in order."""
    digest = hashlib.sha256()
    for row in rows:
        for name in ("input_ids", "labels"):
            digest.update(np.asarray([len(row[name]), *row[name]], dtype="<i8").tobytes())
    return digest.hexdigest()


def describe_data(report: DataReport, *, max_length: int) -> str:
    """What was read, in one line."""
    if not report.tokens:
        return f"data: {report.rows:,} prompts"
    text = (
        f"data: {report.rows:,} rows, {report.tokens:,} tokens, {report.supervised_tokens / report.tokens:.0%} trained"
    )
    if report.truncated_rows:
        text += f"; {report.truncated_rows:,} rows cut at max_length={max_length}"
    if report.rows_without_labels:
        text += f"; {report.rows_without_labels:,} rows have no answer left"
    return text


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of every parameter's name, shape, dtype and some 64 of its values: enough to tell models apart."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().reshape(-1)
        few = values[:: max(1, values.numel() // 64)].cpu().contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(few.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make_summary(
    config: RunConfig,
    *,
    tuning: Tuning | PeerTuning,
    trainer: ThriftyTrainer,
    report: DataReport,
    after: Mapping[str, float],
) -> dict[str, Any]:
    """All of `summary.json`.

    `train_seconds`: from the first probe batch to the last step, without loading, evaluation and saving; all parts of
    a resumed run together. `tokens_per_second`: unpadded tokens over those seconds without the probe's.
    `peak_memory_bytes`: during the probe and training; on a CPU the resident bytes above what loading the model left,
    on an accelerator its maximum, the model included. `result_step`: the step whose values are in `delta/`
    (`best_step` with early stopping, else the last). `padding`: the share of the positions in the training batches that
    held no token; None where TRL trained. `packed_rows`: into how many rows those of the data were packed; None without
    packing. `skipped_steps`: passed over, not finite (`nonfinite`).
    `fingerprints`: SHA-256 of the model, and of the rows as tokens; `files`: of the files that these were read
    from. `config`, `versions`, `commit` and `machine` are what it takes to make the run again.
    """
    state = trainer.state
    return {
        "method": tuning.method.name,
        "method_options": plain(tuning.method.options),
        "objective": plain(config.objective),
        "fingerprints": trainer.record["fingerprints"],
        "files": trainer.record["files"],
        "model": config.model,
        "trainable_parameters": tuning.trainable_parameters,
        "trainable_share": tuning.trainable_share,
        "plan_sha256": tuning.plan.digest(),
        "train_seconds": trainer.clock.seconds,
        "probe_seconds": trainer.record["probe_seconds"],
        "tokens_per_second": trainer.tokens_per_second,
        "peak_memory_bytes": trainer.peak_memory_bytes,
        "evaluation": {"before": trainer.record["before"] or {}, "after": dict(after)},
        "steps": state.global_step,
        "skipped_steps": trainer.finite.skipped,
        "epochs": state.epoch,
        "tokens": state.num_input_tokens_seen,
        "padding": trainer.padding,
        "packed_rows": len(trainer.order.lengths) if config.packing else None,
        "result_step": trainer.result_step,
        "best_step": state.best_global_step,
        "best_eval_loss": state.best_metric,
        "learning_rate": trainer.args.learning_rate,
        "device": str(trainer.args.device),
        "data": dataclasses.asdict(report),
        "versions": versions(),
        "commit": trainer.record["commit"],
        "machine": {**trainer.record["machine"], "processes": trainer.record["processes"]},
        "seed": config.seed,
        "config": config.to_dict(),
    }


def delta_info(config: RunConfig, *, trainer: ThriftyTrainer) -> dict[str, Any]:
    """What a delta tells of its run wherever it goes; no path of this machine. The run's `summary.json` tells more."""
    return {
        "fingerprints": trainer.record["fingerprints"],
        "objective": plain(config.objective),
        "budget": None if config.budget is None else str(config.budget),
        "steps": trainer.state.global_step,
        "learning_rate": trainer.args.learning_rate,
        "seed": config.seed,
        **({} if config.quantize is None else {"quantize": config.quantize}),
        "versions": versions(),
    }


def print_result(summary: Mapping[str, Any], *, output: Path, console: Console) -> None:
    """A few lines for the user: what changed, what it cost, where it is."""
    lines = [
        f"{summary['steps']} steps in {human_time(summary['train_seconds'])}, "
        f"{summary['tokens_per_second']:,.0f} tokens/s, peak memory {human_bytes(summary['peak_memory_bytes'])}"
    ]
    before, after = summary["evaluation"]["before"], summary["evaluation"]["after"]
    for name, value in after.items():
        was = f"{before[name]:.4f} -> " if name in before else ""
        lines.append(f"{name}: {was}{value:.4f}")
    lines.append(f"delta: {output / 'delta'}  summary: {output / 'summary.json'}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
