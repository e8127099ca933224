"""A study's runs as processes of this machine, and what any other way to make them has to offer."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from thrifty.core.files import write_json

from .records import RUNS

if TYPE_CHECKING:
    from .spec import Spec  # it loads torch, which who only starts runs does without

__all__ = ["ENDED", "WORK", "Maker", "Processes", "end_runs", "processors", "start_run"]

ENDED = {-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT}  # not the run's own failure
WORK = "work"  # logs, and what a run writes until its record is there
_GRACE = 10  # seconds for a run to end in


class Maker(Protocol):
    """Makes runs side by side. A run's log is `work/NAME.log`; one that ended well leaves `runs/NAME.json`."""

    workers: int  # runs side by side, at most
    threads: int  # of each run
    where: str  # for the user

    def start(self, spec: Spec, lock: IO[str]) -> None:
        """Begin a run; who holds `lock` keeps other sittings from it."""

    def wait(self, seconds: float) -> dict[str, int]:
        """Wait until a run is over, at most so many seconds. Those over since the last call, and their codes."""

    def stop(self) -> None:
        """End the runs under way, which leave nothing."""


class Processes:
    """Each run is a process of this machine. It outlives a study that is killed, and then keeps the lock."""

    where = ""

    def __init__(self, folder: Path, *, workers: int | None, threads: int | None) -> None:
        self.folder, self.workers = folder, workers or 1
        self.threads = threads or max(1, processors() // self.workers)
        self.children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, spec: Spec, lock: IO[str]) -> None:
        place = self.folder / WORK / spec.name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        with (self.folder / WORK / f"{spec.name}.log").open("w") as log:
            self.children[spec.name] = start_run(
                dataclasses.asdict(spec),
                place,
                record=self.folder / RUNS / f"{spec.name}.json",
                threads=self.threads,
                stdout=log,
                pass_fds=[lock.fileno()],
            )

    def wait(self, seconds: float) -> dict[str, int]:
        ends, over = time.monotonic() + seconds, dict[str, int]()
        while not over and time.monotonic() < ends:
            time.sleep(0.05)
            over = {name: code for name, child in self.children.items() if (code := child.poll()) is not None}
        for name in over:
            del self.children[name]
            shutil.rmtree(self.folder / WORK / name, ignore_errors=True)
        return over

    def stop(self) -> None:
        end_runs(self.children.values())
        for name in self.children:
            shutil.rmtree(self.folder / WORK / name, ignore_errors=True)
        self.children.clear()


def start_run(
    spec: Mapping[str, Any], place: Path, *, record: Path, threads: int, worker: str = "worker", **options: Any
) -> subprocess.Popen[bytes]:
    """Begin one run in a process of its own, which works in the folder `place`; `options` as for Popen.

    `worker`: the module of this package that makes it.
    """
    write_json(place / "spec.json", spec)
    command = [sys.executable, "-m", f"thrifty.study.{worker}"]
    command += [str(place / "spec.json"), str(record), str(place / "run")]
    return subprocess.Popen(
        command,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "COLUMNS": "1000"},
        start_new_session=True,  # Ctrl-C in a terminal reaches the study alone
        **options,
    )


def end_runs(children: Iterable[subprocess.Popen[bytes]]) -> None:
    """End processes, and wait until they are no more: 10 seconds of their own will, then by force."""
    children = list(children)
    for child in children:
        child.terminate()
    for child in children:
        try:
            child.wait(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
