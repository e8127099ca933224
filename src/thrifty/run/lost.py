"""Another of the processes that train together ends without a word: one line that says how to go on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import distributed

from thrifty.core.errors import ThriftyError
from thrifty.core.processes import processes

from .folder_state import stopped

__all__ = ["lost_processes"]

_GONE = re.compile(r"gloo|nccl|connection (reset|closed|refused)|broken pipe|socket timeout", re.IGNORECASE)


@contextmanager
def lost_processes(output: Path, *, saves: bool) -> Iterator[None]:
    """Inside, a lost connection to another process is a ThriftyError that names the checkpoint to go on from."""
    try:
        yield
    except RuntimeError as error:
        gone = isinstance(error, distributed.DistError) or _GONE.search(str(error))
        if processes() == 1 or not gone:
            raise
        raise ThriftyError(
            f"another process is gone, its own output says why; {stopped(output, saves=saves)}"
        ) from error
