"""Memory that was freed but that the C library keeps for later: given back to the system."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

__all__ = ["trim_heap"]


@cache
def _malloc_trim() -> Any:
    """glibc's own; None elsewhere."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def trim_heap() -> None:
    """Give back what has been freed, some milliseconds; only glibc's heap (Linux) needs it.

    Tensors of some megabytes lie there, and between those that stay the freed ones leave holes: what a phase with other
    sizes, such as the probe, leaves behind would be added to the resident peak of the next.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)
