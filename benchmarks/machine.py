"""What was measured on: threads, processor, memory, versions."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

__all__ = ["describe", "keep_heap", "pin"]

_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "numpy")


def pin(threads: int) -> None:
    """Use `threads` threads, on the first `threads` cores that this process may use (Linux)."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)


def keep_heap() -> None:
    """Let glibc keep what is freed (Linux): whether it gives the top of its heap back between two steps, to ask for it
    again page by page, is chance, and can cost 3 % of a step."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        trim_threshold, mmap_threshold = -1, -3  # numbers of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)


def describe(*, threads: int) -> dict[str, Any]:
    """One record of the machine, the versions and the commit."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "src", "benchmarks"], capture_output=True, text=True, check=False
    )
    return {
        "processor": name[1] if name else platform.processor(),
        "features": sorted(set(re.findall(r"\b(avx2|avx512f|avx512_bf16|amx_bf16)\b", text))),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in _PACKAGES},
        "commit": commit.stdout.strip() + (" with changes" if dirty.stdout.strip() else ""),
        "load_before": os.getloadavg()[0],
    }
