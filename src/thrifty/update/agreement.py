"""One plan for all processes: they compare what they chose before anything is trained by it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import distributed, nn

from ..core.errors import ThriftyError
from ..core.plan import Plan
from ..core.processes import meeting_place, processes

__all__ = ["agreeing"]

_DIGEST = hashlib.sha256().digest_size


@contextmanager
def agreeing(model: nn.Module) -> Iterator[Callable[[Plan], None]]:
    """The body chooses a plan and calls what this gives with it. Several processes do so together, each with its copy
    of `model`.

    On leaving, ThriftyError where their plans differ, or where another process could not choose one; what the body
    itself raises goes on after the others were told, so that none of them waits for it.
    """
    proposed, found = list[Plan](), list[list[int]]()
    try:
        yield proposed.append
    finally:
        if processes() > 1:
            digest = bytes.fromhex(proposed[0].digest()) if proposed else bytes(_DIGEST)  # zeros: no plan
            found = _gathered(digest, device=meeting_place(next(model.parameters()).device))
    if not all(any(other) for other in found):
        raise ThriftyError("another process could not choose a plan: its own message says why")
    if any(other != found[0] for other in found):
        raise ThriftyError(
            "the processes chose different plans, so their leaves would not be the same numbers: give each the same "
            "batches to look at, and let PyTorch compute deterministically (torch.use_deterministic_algorithms)"
        )


def _gathered(digest: bytes, *, device: torch.device) -> list[list[int]]:
    own = torch.tensor([*digest], dtype=torch.uint8, device=device)
    others = [torch.empty_like(own) for _ in range(processes())]
    distributed.all_gather(others, own)
    return [other.tolist() for other in others]
