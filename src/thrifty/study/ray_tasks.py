"""A study's runs as tasks of a Ray cluster: each in a process of its own on some node, whose record comes back."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from thrifty.core.errors import ThriftyError
from thrifty.core.files import write_text

from .processes import ENDED, WORK, end_runs, processors, start_run
from .records import RUNS

try:
    import ray
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError
except ImportError:
    raise ThriftyError("--ray needs Ray: pip install 'thrifty[ray]'") from None

if TYPE_CHECKING:
    from .spec import Spec  # it loads torch, which a Ray worker does without

__all__ = ["RayTasks"]

_RETRIES = 3  # of a run whose Ray worker, or whose node, died
_ANSWER = 60  # seconds for a cluster to let a process join
_CANCEL = 20  # seconds for the tasks to end their runs in
_LOG = 2**20  # characters of a run's log that come back, its last


class RayTasks:
    """Each run is a task, tried again where its Ray worker or node dies; what the run itself ends with stands."""

    def __init__(self, folder: Path, *, address: str, workers: int | None, threads: int | None) -> None:
        if ray.is_initialized():
            raise ThriftyError("Ray runs in this process already: end it with ray.shutdown() first")
        # a run that has too little memory would be tried without end
        os.environ.setdefault("RAY_task_oom_retries", str(_RETRIES))
        if address == "local":
            os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 would change what runs measure
            cpus = workers * threads if workers and threads else max(processors(), workers or threads or 1)
            _join(address, num_cpus=cpus, include_dashboard=False)
        else:
            _look(address)
            _join(address)
        try:
            self.workers, self.threads, gpus = _shares(workers, threads)
        except ThriftyError:
            ray.shutdown()
            raise
        self.where = f" on Ray ({address})"
        self.folder = folder
        self.tasks: dict[Any, str] = {}  # the name of each one's run
        self.make = ray.remote(
            num_cpus=self.threads, num_gpus=gpus, max_retries=_RETRIES, retry_exceptions=[_EndedError]
        )(_make)

    def start(self, spec: Spec, lock: IO[str]) -> None:
        make = self.make.options(name=spec.name)
        task = make.remote(dataclasses.asdict(spec), threads=self.threads, folder=os.getcwd())
        self.tasks[task] = spec.name

    def wait(self, seconds: float) -> dict[str, int]:
        try:
            over, _ = ray.wait(list(self.tasks), num_returns=1, timeout=seconds)
            return {name: self._collect(task, name) for task in over if (name := self.tasks.pop(task))}
        except (RayError, ConnectionError) as error:
            raise ThriftyError(f"Ray: {_reason(error)}") from None

    def _collect(self, task: Any, name: str) -> int:
        """Write the log and the record of a run that is over. Its exit code.

        ThriftyError where no run was made, for a reason that the next one would meet as well.
        """
        try:
            code, said, record = ray.get(task)
        except (NodeDiedError, OutOfMemoryError, WorkerCrashedError) as error:
            reason = "its node ran out of memory" if isinstance(error, OutOfMemoryError) else "its Ray worker died"
            code, said, record = 1, f"thrifty: {reason} on all of {1 + _RETRIES} tries\n", None
        except RayTaskError as error:
            if isinstance(error.cause, _EndedError):
                return -signal.SIGTERM
            text = _reason(error.cause)
            if not isinstance(error.cause, ThriftyError):
                text += "; every node needs the same versions of Python, thrifty and Ray"
            raise ThriftyError(f"Ray: {text}") from None
        (self.folder / WORK / f"{name}.log").write_text(said, encoding="utf-8")
        if record is not None:
            write_text(self.folder / RUNS / f"{name}.json", record)
        return int(code)

    def stop(self) -> None:
        with contextlib.suppress(RayError, ConnectionError):  # of a cluster that is no more
            for task in self.tasks:
                ray.cancel(task)
            if self.tasks:
                _, left = ray.wait(list(self.tasks), num_returns=len(self.tasks), timeout=_CANCEL)
                for task in left:
                    ray.cancel(task, force=True)
        self.tasks.clear()
        ray.shutdown()


def _look(address: str) -> None:
    """ThriftyError where no cluster answers at `address`, after a minute at most: Ray itself would ask for many."""
    if address != "auto":
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if not host or not port.isdecimal():
            raise ThriftyError(f"--ray must be local, auto, HOST:PORT or ray://HOST:PORT, not {address!r}")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError, UnicodeError) as error:
            raise ThriftyError(f"--ray {address}: nothing answers there ({error}); is the cluster up?") from None
    if address.startswith("ray://"):
        return
    command = [sys.executable, "-c", "import ray, sys; ray.init(sys.argv[1], log_to_driver=False)", address]
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER, check=True)
    except subprocess.TimeoutExpired:
        raise ThriftyError(
            f"--ray {address}: no Ray cluster answers there within {_ANSWER} seconds; the port is the one that "
            "`ray start --head` names, and ray://HOST:10001 joins from a machine that is no node"
        ) from None
    except subprocess.CalledProcessError as error:
        raise ThriftyError(f"--ray {address}: {error.stderr.strip().splitlines()[-1]}") from None


def _join(address: str, **options: Any) -> None:
    """`ray.init`; ThriftyError with Ray's own reason where it fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # of many classes, which Ray does not name
        raise ThriftyError(f"--ray {address}: {_reason(error)}") from None


def _reason(error: object) -> str:
    """What an error of Ray says, in one line: its first, or where a traceback follows the last."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[-1] if lines[0].endswith(":") else lines[0]


def _shares(workers: int | None, threads: int | None) -> tuple[int, int, int]:
    """Runs side by side, and the CPUs and GPUs of each; what is not given is chosen so that the cluster is full.

    Where the cluster has GPUs each run takes one. ThriftyError where a run fits on no node.
    """
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    rooms = [(int(has.get("CPU", 0)), int(has.get("GPU", 0))) for has in alive]
    gpus = int(any(gpu for _, gpu in rooms))
    rooms = [(cpu, gpu) for cpu, gpu in rooms if cpu and (gpu or not gpus)]
    largest = max((cpu for cpu, _ in rooms), default=0)
    if threads is None:
        per_gpu = min((cpu // gpu for cpu, gpu in rooms if gpu), default=1)
        share = sum(cpu for cpu, _ in rooms) // workers if workers else per_gpu
        threads = max(1, min(largest, share))
    slots = sum(min(cpu // threads, gpu) if gpus else cpu // threads for cpu, gpu in rooms)
    if not slots:
        raise ThriftyError(f"--threads {threads}: the largest node of the Ray cluster has {largest} CPUs")
    return workers or slots, threads, gpus


class _EndedError(Exception):
    """A run was ended by SIGTERM or SIGINT, as a node does that is shut down."""


def _make(spec: dict[str, Any], *, threads: int, folder: str) -> tuple[int, str, str | None]:
    """In a Ray worker: one run, which reads relative paths from `folder`. Its exit code, log, and record (JSON).

    ThriftyError where this node has no such folder. What the run writes lies in a temporary folder until it is over; it
    stays there only where the node itself dies.
    """
    if not os.path.isdir(folder):
        raise ThriftyError(
            f"the node {platform.node()} has no folder {folder}, where the study's relative paths begin: data and "
            "model must lie at the same paths on every node"
        )
    with tempfile.TemporaryDirectory(prefix="thrifty-") as made:
        place = Path(made)
        log, record = place / "log", place / "record.json"
        with log.open("w") as file:
            child = start_run(
                spec,
                place,
                record=record,
                threads=threads,
                worker="remote_worker",
                stdin=subprocess.PIPE,
                stdout=file,
                cwd=folder,
            )
        try:
            while child.poll() is None:
                time.sleep(0.1)  # ray.cancel interrupts between two looks
        finally:
            end_runs([child])
        if child.returncode in ENDED:
            raise _EndedError
        said = log.read_text(encoding="utf-8", errors="replace")[-_LOG:]
        return child.returncode, said, record.read_text(encoding="utf-8") if child.returncode == 0 else None
