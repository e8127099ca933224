"""A checkpoint's weights stream into a model: one tensor at a time in memory beside what is already in its place.

transformers maps the files into memory and keeps each tensor as it lies there, or makes a copy in the wanted dtype.
What it copies it has read: until the last tensor the pages stay resident beside the copies (half a model more for
bfloat16 -> float32), and where tensors are joined (experts) its threads copy faster than joining frees. Pages of files
are given back when memory is short, yet they count towards what a process is seen to take.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from transformers import modeling_utils

__all__ = ["streaming"]

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"  # of transformers


@contextmanager
def streaming(dtype: torch.dtype | str) -> Iterator[None]:
    """Inside, `from_pretrained(dtype=dtype)` reads tensor by tensor, and files that hold another dtype without mapping
    them. Those in `dtype` stay mapped: pages are read when needed and shared by the processes of a machine."""
    wanted = _NAMES.get(dtype) if isinstance(dtype, torch.dtype) else None

    def opened(file: Any, framework: str, device: Any = "cpu", *, backend: str = "mmap") -> Any:
        found = safe_open(file, framework=framework, device=device, backend=backend)
        held = {found.get_slice(name).get_dtype() for name in list(found.keys())}
        if backend == "mmap" and wanted and held != {wanted}:
            found = safe_open(file, framework=framework, device=device, backend="pread")
        return found

    before = modeling_utils.safe_open, os.environ.get(_ONE_BY_ONE)
    modeling_utils.safe_open, os.environ[_ONE_BY_ONE] = opened, "1"
    try:
        yield
    finally:
        modeling_utils.safe_open = before[0]
        if before[1] is None:
            del os.environ[_ONE_BY_ONE]
        else:
            os.environ[_ONE_BY_ONE] = before[1]
