"""Several processes that train together (torch.distributed): who they are, and sums over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from .errors import ThriftyError

__all__ = ["meeting_place", "processes", "rank", "sum_over_processes", "together"]


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def processes() -> int:
    """How many train together; 1 where torch.distributed is not initialized."""
    return distributed.get_world_size() if _joined() else 1


def rank() -> int:
    """This process's number, from 0 on."""
    return distributed.get_rank() if _joined() else 0


def meeting_place(device: torch.device) -> torch.device:
    """Where tensors have to lie that the processes exchange: `device`, unless the backend knows accelerators alone."""
    if _joined() and device.type == "cpu" and distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def sum_over_processes(values: Tensor) -> None:
    """Replace `values` by their sum over all processes. All of them call this, in the same order."""
    if processes() == 1:
        return
    moved = values.to(meeting_place(values.device))
    distributed.all_reduce(moved)
    if moved is not values:
        values.copy_(moved)


@contextmanager
def together(what: str) -> Iterator[None]:
    """The body runs in all processes. On leaving, ThriftyError in those that got through it where another one failed,
    so that none waits for it; `what` they were doing."""
    failed = torch.ones(1)
    try:
        yield
        failed.zero_()
    finally:
        mine = bool(failed)
        sum_over_processes(failed)
    if bool(failed) and not mine:
        raise ThriftyError(f"another process failed while {what}: its own message says why")
