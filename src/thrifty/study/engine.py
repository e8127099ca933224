"""Runs a study: what is missing, several runs side by side; stopped and resumed at will."""

from __future__ import annotations

import fcntl
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from thrifty.core.errors import ThriftyError, unknown
from thrifty.core.files import write_text

from .config import Study
from .measures import check as check_measures
from .plan import check, done_and_planned, hopeless, ready, specs
from .processes import ENDED, WORK, Maker, Processes
from .records import RUNS, read_records, write_record
from .spec import Spec

__all__ = ["run_study"]

_ERROR = re.compile(r"thrifty: |[A-Za-z_.]*(Error|Exception|Interrupt)\b")  # what a traceback ends with, or ours
_PAUSE = 0.5  # seconds between two looks at what other sittings made, and at signals


def run_study(
    study: Study,
    *,
    workers: int | None = None,
    threads: int | None = None,
    ray: str | None = None,
    stop_after: float | None = None,
    only: tuple[str, ...] = (),
    retry_failed: bool = False,
    say: Callable[[str], None] = print,
) -> bool:
    """Check every run's configuration, then make the runs that the study's folder lacks. Whether none is left to make.

    Args:
        workers: runs side by side; each takes `threads` threads (by default its part of the processors). With `ray`
            it is by default as many as the cluster has room for, else one.
        ray: make the runs on a Ray cluster: the address of one, or "local" to start one on this machine.
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
    if retry_failed:
        for name, record in read_records(folder).items():
            if record.failed:
                (folder / RUNS / f"{name}.json").unlink()
    _refuse_changes(study, folder)
    _keep_text(study, folder / "study.yaml", say)
    main = threading.current_thread() is threading.main_thread()  # no other may set what signals do
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT) if main}
    try:
        maker = _maker(folder, workers=workers, threads=threads, ray=ray)  # Ray sets what SIGTERM does
        sitting = _Sitting(study, folder, maker, only=only, stop_after=stop_after, say=say)
        for number in before:
            signal.signal(number, sitting.interrupt)
        sitting.work()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return not ready(study, read_records(folder))


def _keep_text(study: Study, kept: Path, say: Callable[[str], None]) -> None:
    """The study as it is run, in its folder. One that says something else is set aside: it may be a user's own file."""
    if kept.exists():
        if study.file is not None and kept.samefile(study.file):
            return
        if kept.read_text(encoding="utf-8") != study.text:
            before = kept.with_name(f"{kept.name}.bak")
            kept.replace(before)
            say(f"study: {kept} said something else; it is now {before}")
    write_text(kept, study.text)


def _maker(folder: Path, *, workers: int | None, threads: int | None, ray: str | None) -> Maker:
    if ray is None:
        return Processes(folder, workers=workers, threads=threads)
    from .ray_tasks import RayTasks  # an extra

    return RayTasks(folder, address=ray, workers=workers, threads=threads)


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


@dataclass(frozen=True)
class _Run:
    """A run under way."""

    spec: Spec
    lock: IO[str]
    began: float  # time.monotonic()


class _Sitting:
    """One call of `run_study`: takes what can be made, has it made, and takes note of what is over."""

    def __init__(
        self,
        study: Study,
        folder: Path,
        maker: Maker,
        *,
        only: tuple[str, ...],
        stop_after: float | None,
        say: Callable[[str], None],
    ) -> None:
        self.study, self.folder, self.maker, self.only, self.say = study, folder, maker, only, say
        self.work_folder = folder / WORK
        self.work_folder.mkdir(exist_ok=True)
        (self.work_folder / ".gitignore").write_text("*\n")
        self.ends = None if stop_after is None else time.monotonic() + 60 * stop_after
        self.running: dict[str, _Run] = {}
        self.interrupted = False

    def work(self) -> None:
        """Make one run after the other, until there is none to make; waits where its own runs may lead to more."""
        done, planned = done_and_planned(self.study, read_records(self.folder))
        maker = self.maker
        shares = f"{maker.workers} side by side, {maker.threads} threads each{maker.where}"
        self.say(f"{self.study.name}: {done} of {planned} runs are over; {shares} -> {self.folder}")
        try:
            while self.begin() and not self.interrupted:
                for name, code in maker.wait(_PAUSE).items():
                    if code in ENDED:
                        self.say(f"{name} was ended from outside: it left nothing, and begins anew in the next sitting")
                        return
                    self.over(name, code)
        finally:
            maker.stop()
            for run in self.running.values():
                run.lock.close()
        if self.interrupted:
            raise KeyboardInterrupt

    def interrupt(self, number: int, frame: object) -> None:
        """What a signal does: the runs are ended at the next pause, at a second signal at once."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def begin(self) -> bool:
        """Begin as many runs as may be under way. Whether any is."""
        while len(self.running) < self.maker.workers and not self.interrupted:
            if self.ends is not None and time.monotonic() > self.ends:
                break
            run = self.take()
            if run is None:
                break
            self.running[run.spec.name] = run
            self.maker.start(run.spec, run.lock)
        return bool(self.running)

    def take(self) -> _Run | None:
        """The next run that nobody makes, and the lock on it."""
        records = read_records(self.folder)
        for spec in hopeless(self.study, records):
            self.fail(spec, "no run of its search, or its calibration, ended well")
        for spec in ready(self.study, records):
            if spec.name in self.running:
                continue
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
            return _Run(spec, lock, time.monotonic())
        return None

    def over(self, name: str, code: int) -> None:
        """Say how a run ended, once its record is there."""
        run = self.running[name]
        if code != 0:
            self.fail(run.spec, _reason(code, self.work_folder / f"{name}.log"))
        self.report(run.spec, began=run.began, code=code)
        del self.running[name]
        run.lock.close()

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

        info = run_info(spec) | {"error_msg": reason, "threads": self.maker.threads}
        record = {"run_info": info, "train_info": {"status": "failed", "metrics": []}, "meta_info": {}}
        write_record(self.folder, spec.name, record)


def _reason(code: int, log: Path) -> str:
    if code == -signal.SIGKILL:
        return "killed by the system: most likely it ran out of memory"
    if code < 0:
        return f"killed by signal {-code}"
    lines = log.read_text(errors="replace").strip().splitlines()
    said = [line for line in lines if _ERROR.match(line)] or lines[-1:]
    return said[-1].removeprefix("thrifty: ") if said else f"ended with code {code}"
