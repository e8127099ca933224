"""SIGTERM and SIGINT while a run works: it saves a checkpoint and leaves; where there is none to save, it leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn

__all__ = ["Stop"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """`with Stop() as stop:` around a run; only in the main thread, elsewhere signals stay with who handles them.

    While `saves` is set, a first signal is only noted (`number`), and whoever trains saves and calls `leave`. Otherwise
    the run is left at once: by SystemExit(143) for SIGTERM, by KeyboardInterrupt for SIGINT. A second signal ends the
    process as if nobody handled it. Signals that are ignored (`nohup`) stay so; at the end all are handled as before.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.saves = False
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN):  # None: handled by other than Python code
                    self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child, such as a data loader's: Ctrl-C is for its parent to answer
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        self.number = number
        if not self.saves:
            self.leave()
        name = signal.Signals(number).name
        text = (
            f"\nthrifty: {name}: a checkpoint is saved at the end of this step; a second signal ends the run at once\n"
        )
        with contextlib.suppress(OSError):  # not through sys.stderr: the signal may have come while that was writing
            os.write(2, text.encode())

    def leave(self) -> NoReturn:
        """End the run as the signal asks."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)
