"""What may differ between a stopped run and the one that goes on with it, and what may not."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from transformers import TrainingArguments

from thrifty.core.errors import ThriftyError

from .checkpoint import Checkpoint

__all__ = ["refuse_changes", "warn_of_processes"]

_log = logging.getLogger("thrifty")

# What a resumed run may set anew: it changes how long the run goes on and what is reported, not the steps themselves.
_FREE = frozenset(
    {
        "output_dir",
        "resume_from_checkpoint",
        "overwrite_output_dir",
        "max_steps",
        "num_train_epochs",
        "allow_changed_data",
        "early_stopping_patience",
        "nonfinite",
        "load_best_model_at_end",
        "report_to",
        "run_name",
        "project",
        "logging_steps",
        "logging_strategy",
        "logging_first_step",
        "eval_steps",
        "eval_strategy",
        "eval_delay",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "per_device_eval_batch_size",
        "log_level",
        "log_level_replica",
        "checkpoint_layers",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "dataloader_persistent_workers",
        "fsdp",
        "fsdp_config",
        "deepspeed",
        "eval",
    }
)
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def refuse_changes(
    checkpoint: Checkpoint,
    *,
    config: Mapping[str, Any],
    processes: int,
    fingerprints: Mapping[str, str] = MappingProxyType({}),
    files: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> None:
    """ThriftyError naming the first key that changed since `checkpoint` and would make the resumed run another one.

    `processes`: how many train now. Another number is one of these changes where the rows of a step change with it.
    `files`: of each key of the data, path -> SHA-256. Other rows are only warned of under `allow_changed_data`.
    """
    record = checkpoint.record()
    worked = record.get("processes", processes)
    stock = {item.name: item.default for item in dataclasses.fields(TrainingArguments)}
    saved, current = dict(_flat(record["config"])), dict(_flat(config))
    batches = [[side.pop(key, stock[key]) for key in _BATCH] for side in (saved, current)]
    start_over = "set it back, or give another output_dir to start anew"
    counts = [(*batches[0], worked), (*batches[1], processes)]
    if math.prod(counts[0]) != math.prod(counts[1]):
        was, is_now = (" * ".join(map(str, of)) for of in counts)
        raise ThriftyError(
            f"{' * '.join(_BATCH)} * processes was {was} in {checkpoint.folder} and is {is_now}: "
            f"the rows of a step would change; {start_over}"
        )
    for key in [*saved, *(key for key in current if key not in saved)]:
        before, now = (side.get(key, stock.get(key)) for side in (saved, current))
        if before != now and key.split(".")[0] not in _FREE:
            raise ThriftyError(f"{key} was {before!r} in {checkpoint.folder} and is now {now!r}; {start_over}")
    for key, content in fingerprints.items():
        if record["fingerprints"].get(key) == content:
            continue
        if not key.startswith("data."):
            raise ThriftyError(f"{key}: its content is not what {checkpoint.folder} was trained with; {start_over}")
        were = record.get("files", {}).get(key, {})
        changed = [path for path, digest in files.get(key, {}).items() if digest != were.get(path)]
        named = ", ".join(changed) or "what it names"
        if config.get("allow_changed_data"):
            _log.warning("%s: %s has other rows than %s was trained with", key, named, checkpoint.folder)
            continue
        raise ThriftyError(
            f"{key}: {named} has changed: its content is not what {checkpoint.folder} was trained with; "
            "put it back, give another output_dir to start anew, or go on with it: allow_changed_data=true"
        )


def warn_of_processes(checkpoint: Checkpoint, *, processes: int) -> None:
    """Say so where `checkpoint` was trained by another number of processes than go on from it."""
    worked = checkpoint.record().get("processes", processes)
    if worked != processes:
        _log.warning(
            "processes: %s was trained by %d and goes on with %d: each step has the same rows, but dropout and "
            "rounding differ, so the result is not to the bit that of an uninterrupted run",
            checkpoint.folder,
            worked,
            processes,
        )
