"""Around every step of any PyTorch optimizer: whoever listens is told before and after it."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

__all__ = ["Listener", "listen", "stop_listening"]


class Listener(Protocol):
    """Told of every optimizer in the process, in the order in which the listeners came."""

    def before_step(self, optimizer: Optimizer) -> None: ...

    def after_step(self, optimizer: Optimizer) -> None: ...


_LISTENERS: list[weakref.ref[Any]] = []
_hooked: list[bool] = []


def listen(listener: Listener) -> None:
    """Tell `listener`, which is held weakly. Parts placed before have written their values when it is told."""
    _LISTENERS[:] = [reference for reference in _LISTENERS if reference() is not None]
    _LISTENERS.append(weakref.ref(listener))
    if not _hooked:
        _hooked.append(True)
        register_optimizer_step_pre_hook(lambda optimizer, *_: _tell("before_step", optimizer))
        register_optimizer_step_post_hook(lambda optimizer, *_: _tell("after_step", optimizer))


def stop_listening(listener: Listener) -> None:
    """Tell `listener` no more."""
    _LISTENERS[:] = [reference for reference in _LISTENERS if reference() is not listener]


def _tell(when: str, optimizer: Optimizer) -> None:
    for reference in list(_LISTENERS):
        listener = reference()
        if listener is not None:
            getattr(listener, when)(optimizer)
