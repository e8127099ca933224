"""Another of the processes that train together ends without a word: one line that says how to go on."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import distributed

from thrifty.core.errors import ThriftyError
from thrifty.core.processes import processes

from .folder_state import stopped

__all__ = ["lost_processes", "warn_of_old_addresses"]

_log = logging.getLogger("thrifty")

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


def warn_of_old_addresses() -> None:
    """Say so where torchrun's restarts would meet the addresses of the processes that are gone.

    PyTorch 2.13 keeps one store over all attempts, under one prefix (`_create_c10d_store` takes it for a new one), so
    that a restarted process may wait for, or call, one of the attempt before. The variable gives each attempt its own.
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("RANK") == "0":
        _log.warning(
            "torchrun --max-restarts: a restart would meet the addresses of the processes before it, and may hang: "
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and give --standalone or --rdzv-backend c10d"
        )
