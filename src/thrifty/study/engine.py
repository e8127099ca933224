"""Runs a study: what is missing, each in a process of its own, several side by side; stopped and resumed at will."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from thrifty.core.errors import ThriftyError, unknown
from thrifty.core.files import write_json, write_text

from .config import Study
from .measures import check as check_measures
from .plan import check, done_and_planned, hopeless, ready, specs
from .records import RUNS, read_records, write_record
from .spec import Spec

__all__ = ["run_study"]

_ERROR = re.compile(r"thrifty: |[A-Za-z_.]*(Error|Exception|Interrupt)\b")  # what a traceback ends with, or ours
_ENDED = {-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT}  # not the run's own failure
_WORK = "work"  # logs, and what a run writes until its record is there


def run_study(
    study: Study,
    *,
    workers: int = 1,
    threads: int | None = None,
    stop_after: float | None = None,
    only: tuple[str, ...] = (),
    retry_failed: bool = False,
    say: Callable[[str], None] = print,
) -> bool:
    """Check every run's configuration, then make the runs that the study's folder lacks. Whether none is left to make.

    Args:
        workers: runs side by side; each takes `threads` threads (by default its part of the processors).
        stop_after: minutes after which no run begins.
        only: labels of methods; others are left for another sitting, or another machine.
        retry_failed: make again what failed before this sitting.

    Several sittings may work in one folder: a run that another one makes is passed over. Ctrl-C ends the runs under
    way, which leave nothing.
    """
    for name, value in (("--workers", workers), ("--threads", threads)):
        if value is not None and value < 1:
            raise ThriftyError(f"{name} must be 1 or more, not {value}")
    for label in only:
        if label not in study.methods:
            raise ThriftyError(f"--only: {unknown('method of this study', label, study.methods)}")
    for name, task in study.tasks.items():
        check_measures(task.measures, where=f"tasks.{name}.measures")
    check(study)
    folder = Path(study.output_dir)
    (folder / RUNS).mkdir(parents=True, exist_ok=True)
    kept = folder / "study.yaml"
    if study.file is None or not kept.exists() or not kept.samefile(study.file):
        write_text(kept, study.text)
    if retry_failed:
        for name, record in read_records(folder).items():
            if record.failed:
                (folder / RUNS / f"{name}.json").unlink()
    _refuse_changes(study, folder)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = threads or max(1, processors // workers)
    sitting = _Sitting(study, folder, threads=threads, only=only, stop_after=stop_after, say=say)
    done, planned = done_and_planned(study, read_records(folder))
    say(f"{study.name}: {done} of {planned} runs are over; {workers} side by side, {threads} threads each -> {folder}")
    crew = [threading.Thread(target=sitting.work, daemon=True) for _ in range(workers)]
    main = threading.current_thread() is threading.main_thread()  # no other may set what signals do
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGINT) if main}
    try:
        for worker in crew:
            worker.start()
        while any(worker.is_alive() for worker in crew):
            time.sleep(0.2)
    except KeyboardInterrupt:
        sitting.stop()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if sitting.error is not None:
        raise sitting.error
    return not ready(study, read_records(folder))


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _refuse_changes(study: Study, folder: Path) -> None:
    """ThriftyError where a run in the folder was made with other settings than the study has now."""
    records = read_records(folder)
    for spec in specs(study, records):
        record = records.get(spec.name)
        if record is not None and record.run_info.get("spec_sha256") != spec.digest():
            raise ThriftyError(
                f"{folder / RUNS / spec.name}.json was made with other settings than the study has now: delete it to "
                "make the run again, or give the study another output_dir"
            )


class _Sitting:
    """What the workers share."""

    def __init__(
        self,
        study: Study,
        folder: Path,
        *,
        threads: int,
        only: tuple[str, ...],
        stop_after: float | None,
        say: Callable[[str], None],
    ) -> None:
        self.study, self.folder, self.threads, self.only, self.say = study, folder, threads, only, say
        self.work_folder = folder / _WORK
        self.work_folder.mkdir(exist_ok=True)
        (self.work_folder / ".gitignore").write_text("*\n")
        self.ends = None if stop_after is None else time.monotonic() + 60 * stop_after
        self.lock = threading.Lock()
        self.running: dict[str, subprocess.Popen[bytes] | None] = {}  # None until it has begun
        self.stopping = False
        self.error: BaseException | None = None

    def work(self) -> None:
        """Take one run after the other, until there is none to take; waits where others' runs may lead to more."""
        try:
            while not self.stopping:
                if self.ends is not None and time.monotonic() > self.ends:
                    return
                taken = self.take()
                if taken is None:
                    with self.lock:
                        idle = not self.running
                    if idle:
                        return
                    time.sleep(0.5)
                    continue
                spec, lock = taken
                with lock:
                    self.make(spec, lock)
        except BaseException as error:
            self.error = error
            self.stop()

    def take(self) -> tuple[Spec, IO[str]] | None:
        """The next run that nobody makes, and the lock on it."""
        with self.lock:
            records = read_records(self.folder)
            for spec in hopeless(self.study, records):
                self.fail(spec, "no run of its search, or its calibration, ended well")
            for spec in ready(self.study, records):
                if self.only and spec.method is not None and spec.method not in self.only:
                    continue
                lock = open(self.work_folder / f"{spec.name}.lock", "w")  # noqa: SIM115  (held while the run lasts)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    lock.close()
                    continue
                if (self.folder / RUNS / f"{spec.name}.json").exists():  # made since the records were read
                    lock.close()
                    continue
                self.running[spec.name] = None
                return spec, lock
        return None

    def make(self, spec: Spec, lock: IO[str]) -> None:
        place = self.work_folder / spec.name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        write_json(place / "spec.json", dataclasses.asdict(spec))
        log, began = self.work_folder / f"{spec.name}.log", time.monotonic()
        command = [sys.executable, "-m", "thrifty.study.worker"]
        command += [str(place / "spec.json"), str(self.folder / RUNS / f"{spec.name}.json"), str(place / "run")]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "COLUMNS": "1000"}
        with log.open("w") as file:
            with self.lock:
                if self.stopping:
                    return
                # the run holds the lock too: it is not made twice while it survives a killed study
                child = subprocess.Popen(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    pass_fds=[lock.fileno()],
                    start_new_session=True,  # Ctrl-C in a terminal reaches the study alone
                )
                self.running[spec.name] = child
            code = child.wait()
        with self.lock:
            self.running.pop(spec.name, None)
            stopping = self.stopping
        shutil.rmtree(place, ignore_errors=True)
        if stopping:
            return
        if code in _ENDED:
            self.say(f"{spec.name} was ended from outside: it left nothing, and begins anew in the next sitting")
            self.stop()
            return
        if code != 0:
            self.fail(spec, _reason(code, log))
        self.report(spec, began=began, code=code)

    def report(self, spec: Spec, *, began: float, code: int) -> None:
        records = read_records(self.folder)
        done, planned = done_and_planned(self.study, records)
        record = records[spec.name]
        measures = record.train_info.get("measures", {})
        said = ", ".join(f"{name} {record.score(name):.4g}" for name in measures) if code == 0 else ""
        said = said or ("done" if code == 0 else f"FAILED: {record.run_info['error_msg']}")
        seconds = time.monotonic() - began
        self.say(f"{time.strftime('%H:%M')} {spec.name}: {said} ({seconds:.0f} s; {done} of {planned} runs)")

    def fail(self, spec: Spec, reason: str) -> None:
        from .worker import run_info  # it loads torch

        info = run_info(spec) | {"error_msg": reason, "threads": self.threads}
        record = {"run_info": info, "train_info": {"status": "failed", "metrics": []}, "meta_info": {}}
        write_record(self.folder, spec.name, record)

    def stop(self) -> None:
        """End the runs under way; they leave nothing."""
        with self.lock:
            self.stopping = True
            children = [child for child in self.running.values() if child is not None]
        for child in children:
            child.terminate()
        for child in children:
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for name in list(self.running):
            shutil.rmtree(self.work_folder / name, ignore_errors=True)


def _reason(code: int, log: Path) -> str:
    if code == -signal.SIGKILL:
        return "killed by the system: most likely it ran out of memory"
    if code < 0:
        return f"killed by signal {-code}"
    lines = log.read_text(errors="replace").strip().splitlines()
    said = [line for line in lines if _ERROR.match(line)] or lines[-1:]
    return said[-1].removeprefix("thrifty: ") if said else f"ended with code {code}"
