"""How much memory and time training takes: measured, in bytes and seconds."""

from __future__ import annotations

import gc
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..core.heap import trim_heap
from ..core.quantized import is_quantized

__all__ = ["Clock", "MemoryMeter", "SavedBytes", "saved_bytes"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _reset_high_water() -> bool:
    """Whether the kernel forgot this process's highest resident size (Linux only)."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _high_water() -> int:
    """The highest resident bytes since the last reset."""
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    assert found is not None
    return 1024 * int(found[1])


class MemoryMeter:
    """The peak since it was made: the accelerator's own maximum, or resident bytes above those at the start.

    Without an accelerator the model's weights were loaded before the start and do not count; with one they do. Where
    the kernel keeps no resettable maximum, a thread samples every 20 ms.
    """

    def __init__(self, model: nn.Module) -> None:
        self._device = next(model.parameters()).device
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._sampled = 0
        if self._device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats()
            return
        _settle(model)
        self._kernel = _reset_high_water()
        self._start = self._process.memory_info().rss
        if not self._kernel:
            threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            self._sampled = max(self._sampled, self._process.memory_info().rss)

    def now(self) -> int:
        """Bytes in use: the accelerator's, or all of this process's resident ones."""
        if self._device.type != "cpu":
            return int(torch.accelerator.memory_allocated())
        return int(self._process.memory_info().rss)

    def peak(self) -> int:
        """Bytes, as the class says."""
        if self._device.type != "cpu":
            return int(torch.accelerator.max_memory_allocated())
        highest = _high_water() if self._kernel else max(self._sampled, self.now())
        return max(0, highest - self._start)

    def close(self) -> None:
        self._stop.set()


def _settle(model: nn.Module) -> None:
    """Make "what loading left" mean the weights: all of them resident, and nothing that loading has freed."""
    gc.collect()
    for parameter in model.parameters():
        if not is_quantized(parameter):  # those were made here
            parameter.detach().reshape(-1)[::512].sum()  # a file's mapped page becomes resident when it is read
    trim_heap()


class Clock:
    """Seconds since the start, without the pauses (evaluation, saving). `start` carries a resumed run's seconds."""

    def __init__(self, start: float = 0.0) -> None:
        self._past = start
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        return self._past + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def run(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        self._past = self.seconds
        self._since = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside; it stays paused if it was."""
        running = self._since is not None
        self.pause()
        try:
            yield
        finally:
            if running:
                self.run()


class _Kept:
    """What autograd holds in place of a saved tensor, so that it lives exactly as long as the graph needs it."""

    def __init__(self, tensor: Tensor, owner: str | None) -> None:
        self.tensor, self.owner = tensor, owner


class SavedBytes:
    """Bytes kept for backward, each storage counted once; filled in when the block of `saved_bytes` ends."""

    def __init__(self) -> None:
        self.total = 0
        self.by_module: dict[str, int] = {}  # chosen module -> bytes that it was the first of them to save

    @property
    def within(self) -> int:
        """Bytes saved inside the chosen modules, whatever else keeps them too."""
        return sum(self.by_module.values())


@contextmanager
def saved_bytes(model: nn.Module, chosen: Callable[[nn.Module], bool] = lambda _: False) -> Iterator[SavedBytes]:
    """What forwards inside the block keep for backward: `with saved_bytes(model) as saved: loss = model(**batch).loss`.

    Counted when the block ends: hold the loss until then, and run backward after it. A storage counts once and whole
    (a view keeps all of it); parameters, buffers and views of them are left out. `chosen` picks the modules of
    `by_module`: what is saved during their forward is theirs, the innermost's where they nest. Not seen: what a
    function hangs on `ctx` past `save_for_backward`, and what activation checkpointing will compute again.
    """
    saved, inside, order = SavedBytes(), list[str](), list[weakref.ref[_Kept]]()

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor, inside[-1] if inside else None)
        order.append(weakref.ref(kept))
        return kept

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if chosen(module):
                enter = module.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
                leave = module.register_forward_hook(lambda *_: _drop_last(inside), always_call=True)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
        stack.enter_context(saved_tensors_hooks(pack, lambda kept: kept.tensor))
        yield saved
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    total: dict[int, int] = {}
    owned: dict[int, tuple[str, int]] = {}
    for kept in [kept for reference in order if (kept := reference()) is not None]:
        for storage in _storages(kept.tensor):
            if storage.data_ptr() not in own:
                total[storage.data_ptr()] = storage.nbytes()
                if kept.owner is not None:
                    owned.setdefault(storage.data_ptr(), (kept.owner, storage.nbytes()))
    saved.total = sum(total.values())
    for name, size in owned.values():
        saved.by_module[name] = saved.by_module.get(name, 0) + size


def _storages(tensor: torch.Tensor) -> list[torch.UntypedStorage]:
    """A sparse tensor's are those of its indices and values."""
    parts = [tensor._indices(), tensor._values()] if tensor.layout == torch.sparse_coo else [tensor]
    return [part.untyped_storage() for part in parts]


def _drop_last(names: list[str]) -> None:
    names.pop()
