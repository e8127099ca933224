"""A machine that has too little memory: one line instead of an allocator's trace."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainingArguments

from thrifty.core.errors import ThriftyError

__all__ = ["memory_errors"]

_ALLOCATOR = re.compile(r"can't allocate memory|not enough memory|out of memory|Cannot allocate memory")
_ASKED = re.compile(r"tried to allocate ([\d.]+ ?\w+)", re.IGNORECASE)


@contextmanager
def memory_errors(args: TrainingArguments) -> Iterator[None]:
    """Inside, memory that an allocator refuses is a ThriftyError that says what needs less of it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        ours = isinstance(error, MemoryError | torch.OutOfMemoryError) or _ALLOCATOR.search(str(error))
        if not ours:
            raise
        asked = _ASKED.search(str(error))
        more = "" if args.activation_checkpointing else ", or give gradient_checkpointing=true"
        raise ThriftyError(
            f"out of memory{f' (asked for {asked[1]})' if asked else ''}: lower per_device_train_batch_size "
            f"(now {args.per_device_train_batch_size}; gradient_accumulation_steps keeps the rows of a step), "
            f"max_length or budget{more}"
        ) from error
