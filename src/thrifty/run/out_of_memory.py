"""When memory runs out in training: one line that says what the estimate finds would fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from thrifty.core.errors import ThriftyError
from thrifty.predict.fit import largest_batch
from thrifty.predict.hardware import Hardware, find_hardware
from thrifty.predict.job import Job
from thrifty.predict.table import gigabytes

from .config import RunConfig
from .estimate import job_of

__all__ = ["advising"]

_CPU_WORDS = ("can't allocate memory", "not enough memory")  # of PyTorch's allocator for the processor


@contextmanager
def advising(config: RunConfig) -> Iterator[None]:
    """Turn an allocator's failure inside into a ThriftyError with what would fit."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(words in str(error) for words in _CPU_WORDS):
            raise
        raise ThriftyError(f"out of memory in training: {_advice(config)}") from error


def _advice(config: RunConfig) -> str:
    try:
        job = job_of(config)
        hardware = _this_device()
        return _what_fits(job, hardware, hardware.memory_bytes)
    except ThriftyError as error:  # the advice must not hide what happened
        return f"lower per_device_train_batch_size or set activation_checkpointing=true ({error})"


def _this_device() -> Hardware:
    if not torch.accelerator.is_available():
        return find_hardware()
    _, total = torch.cuda.mem_get_info()
    return dataclasses.replace(find_hardware("a100-40gb"), name="this device", memory_gb=total / 1e9)


def _what_fits(job: Job, hardware: Hardware, memory_bytes: float) -> str:
    found = largest_batch(job, hardware, memory_bytes, most=job.rows)
    if found is not None and found < job.rows:
        parts = -(-job.rows * job.accumulation // found)
        return (
            f"the estimate for {gigabytes(memory_bytes)} is per_device_train_batch_size={found} with "
            f"gradient_accumulation_steps={parts} for the same step"
        )
    saving = dataclasses.replace(job, checkpointing=True)
    if not job.checkpointing and (rows := largest_batch(saving, hardware, memory_bytes, most=job.rows)) is not None:
        return (
            f"the estimate for {gigabytes(memory_bytes)} is activation_checkpointing=true with "
            f"per_device_train_batch_size={rows}"
        )
    if found is None:
        return (
            f"not even one row is estimated to fit into {gigabytes(memory_bytes)}: lower max_length, or dtype=bfloat16"
        )
    return f"the estimate says that it fits into {gigabytes(memory_bytes)}: something else holds memory on this device"
