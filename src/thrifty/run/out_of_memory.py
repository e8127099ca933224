"""A machine that has too little memory: one line that says what the estimate finds would fit."""

from __future__ import annotations

import dataclasses
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from thrifty.core.errors import ThriftyError
from thrifty.core.memory import total_memory
from thrifty.predict.fit import largest_batch
from thrifty.predict.hardware import Hardware, find_hardware
from thrifty.predict.job import Job
from thrifty.predict.table import gigabytes

from .config import RunConfig
from .display import human_bytes
from .estimate import job_of

__all__ = ["memory_errors"]

_ALLOCATOR = re.compile(r"can't allocate memory|not enough memory|out of memory|Cannot allocate memory")
_ASKED = re.compile(r"tried to allocate ([\d.]+) ?(\w+)", re.IGNORECASE)


@contextmanager
def memory_errors(config: RunConfig) -> Iterator[None]:
    """Inside, memory that an allocator refuses is a ThriftyError that says what would fit, or what needs less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        ours = isinstance(error, MemoryError | torch.OutOfMemoryError) or _ALLOCATOR.search(str(error))
        if not ours:
            raise
        _let_go(error)
        raise ThriftyError(f"out of memory{_asked(str(error))}: {_advice(config)}") from error


def _let_go(error: BaseException | None) -> None:
    """Frees what the frames of `error` hold, the model and its step's activations: the advice needs memory too, and a
    tokenizer, which is not written in Python, aborts or hangs where it gets none."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _asked(said: str) -> str:
    found = _ASKED.search(said)
    if found is None:
        return ""
    return f" (asked for {human_bytes(int(found[1])) if found[2] == 'bytes' else ' '.join(found.groups())})"


def _advice(config: RunConfig) -> str:
    try:
        hardware = _this_device()
        return _what_fits(job_of(config), hardware, hardware.memory_bytes)
    except Exception:  # also of a library that cannot be loaded any more: the advice must not hide what happened
        return _needs_less(int(config.training.get("per_device_train_batch_size", 8)))


def _needs_less(rows: int) -> str:
    return (
        f"lower per_device_train_batch_size (now {rows}; gradient_accumulation_steps keeps the rows of a step), "
        "max_length or budget, or give activation_checkpointing=true"
    )


def _this_device() -> Hardware:
    if not torch.cuda.is_available():
        return find_hardware()
    memory = total_memory("cuda") / 1e9
    return dataclasses.replace(find_hardware("a100-40gb"), name="this device", memory_gb=memory)


def _what_fits(job: Job, hardware: Hardware, memory_bytes: float) -> str:
    found, memory = largest_batch(job, hardware, memory_bytes, most=job.rows), gigabytes(memory_bytes)
    if found == job.rows:
        return f"the estimate for {memory} says that it fits: free what else takes memory, or {_needs_less(job.rows)}"
    if found is not None:
        parts = -(-job.rows * job.accumulation // found)
        return (
            f"the estimate for {memory} is per_device_train_batch_size={found} with "
            f"gradient_accumulation_steps={parts} for the same step"
        )
    saving = dataclasses.replace(job, checkpointing=True, checkpoint_layers=None)
    rows = None if saving == job else largest_batch(saving, hardware, memory_bytes, most=job.rows)
    if rows is not None:
        return f"the estimate for {memory} is activation_checkpointing=true with per_device_train_batch_size={rows}"
    return f"not even one row is estimated to fit into {memory}: lower max_length, or dtype=bfloat16"
