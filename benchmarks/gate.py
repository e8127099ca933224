"""One process per contender: it waits until it is told to take its next step, takes it, and says how long it took."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Gate", "Stopped"]


class Stopped(Exception):
    """The measurement is over."""


class Gate:
    """Talks to `rounds.py` over the standard streams; everything else that prints goes to standard error."""

    def __init__(self) -> None:
        self._out = sys.stdout
        sys.stdout = sys.stderr

    def say(self, **message: Any) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def wait(self) -> None:
        """Until the next step may begin. Stopped at the end."""
        if sys.stdin.readline().strip() != "go":
            raise Stopped

    def loop(self, step: Callable[[], None], *, wake: Callable[[], None]) -> None:
        """Take steps as told until the end. `wake` comes before each and is not timed: what had to wait for its turn
        finds its weights in memory and its threads running."""
        while True:
            try:
                self.wait()
            except Stopped:
                return
            wake()
            start = time.perf_counter()
            step()
            self.say(seconds=time.perf_counter() - start)
