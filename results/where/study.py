"""All ways of choosing what to train: SmolLM2-135M on snips, run by run. See docs/results/where.md.

    DATA=<folder of the data> OUT=<scratch folder> python results/where/study.py [--stop-after MINUTES] [--threads N]

Resumable: a run with a JSON file is skipped, and the file appears only when the run is over. Beside this script land
base.json (the model before training), search-METHOD-RATE.json (loss on held-back training rows after a short run),
final-METHOD-SEED.json (at the search's best rate) and failed-NAME.json (a run that ended with an error; delete it, or
give --retry-failed, to try again). Each is the run's own summary.json with the settings, the commit and the threads
under "study". Runs are driven through `$THRIFTY`, by default this Python's `-m thrifty`; OUT keeps their logs.
"""

import argparse
import fcntl
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODEL = "smollm2-135m"
SEEDS = (0, 1)
STEPS, BATCH, EVAL_ROWS, MAX_LENGTH = 80, 16, 200, 256
SEARCH_STEPS, SEARCH_BATCH, SEARCH_UNITS = 20, 8, 4
RATES = [f"{digit}e-{power}" for power in range(6, 0, -1) for digit in (1, 3)]  # the search moves along these


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method of the study. `rates`: the grid of the search; `budget`: False where the method sets its own size."""

    method: str
    rates: tuple[str, ...] = ("1e-3", "3e-3", "1e-2")
    budget: bool = True
    settings: tuple[str, ...] = ()
    search_method: str | None = None  # where the search takes a cheaper form
    note: str = ""


_SPREAD = ("3e-3", "1e-2", "3e-2")  # blocks and pairs in all matrices: results/first-run has 1e-2 to 3e-2
_WIDE = ("1e-4", "3e-4", "1e-3")  # whole layers: results/first-run has 3e-4 for full
_TEXT = "$DATA/general_text_train.txt"

# In the order of the runs: the flagship and its controls first.
METHODS: dict[str, Entry] = {
    "smt": Entry(method="smt", note="the best blocks of all matrices together"),
    "smt_accumulated": Entry(
        method="{smt: {score: accumulated_grad}}", note="the paper's score: gradients summed before |.|"
    ),
    "smt_per_matrix": Entry(method="{smt: {scope: per_matrix}}", rates=_SPREAD, note="a share in each matrix"),
    "diablo": Entry(method="{diablo: {blocks: 82}}", rates=_SPREAD, note="82 blocks a matrix come to 1 %"),
    "random_blocks": Entry(method="random_blocks", rates=_SPREAD),
    "lift": Entry(method="lift", note="rank 128; the mask of the start is kept"),
    "gps": Entry(method="gps"),
    "random_entries": Entry(method="random_entries", rates=_SPREAD),
    "magnitude": Entry(method="magnitude"),
    "full": Entry(method="full", rates=_WIDE, budget=False),
    "bitfit": Entry(method="bitfit", rates=("1e-2",), budget=False, note="the model has no biases"),
    "lisa": Entry(method="lisa", rates=_WIDE, budget=False, note="2 layers, drawn every 20 steps"),
    "hft": Entry(method="{hft: {period: 40}}", rates=_WIDE, budget=False, note="two rounds of 40 steps"),
    "telly": Entry(method="telly", rates=_WIDE, budget=False, note="the top two layers"),
    "greentrainer": Entry(method="greentrainer", rates=_WIDE, budget=False, note="rho 0.5; one selection"),
    "spafit": Entry(
        method="{spafit: {vectors: norms}}", rates=_SPREAD, budget=False, note="norms stand in for the missing biases"
    ),
    "spt_sensitivity": Entry(
        method="spt_sensitivity", settings=("probe_rows=1", "probe_units=64"), note="sensitivity row by row"
    ),
    "composable_sft": Entry(
        method="composable_sft", rates=("3e-4", "1e-3", "3e-3"), note="half of the steps train all"
    ),
    "locft_bf": Entry(method="locft_bf", rates=("3e-4", "1e-3", "3e-3"), budget=False, note="one matrix"),
    "senszo_mask": Entry(method=f"{{senszo_mask: {{text: {_TEXT}}}}}", note="the paper trains 0.1 %"),
    "loki": Entry(
        method=f"{{loki: {{text: {_TEXT}}}}}",
        search_method=f"{{loki: {{text: {_TEXT}, joint: true}}}}",
        rates=_SPREAD,
        settings=("probe_units=4",),
        note="attribution on 16 windows of general text; the search took the joint form",
    ),
    "random_rows": Entry(method="random_rows", rates=_SPREAD),
    "random_columns": Entry(method="random_columns", rates=_SPREAD),
    "sparsegrad": Entry(method="sparsegrad", rates=_WIDE, note="1 % of a step's gradient; the result is dense"),
    "lora_r16": Entry(
        method="{peft: {peft_type: LORA, r: 16, lora_alpha: 32}}", budget=False, note="PEFT's, on all linear layers"
    ),
}


class Stopped(Exception):
    """The study ends here, between two runs or by a signal."""


class Study:
    """One sitting: makes what is missing in `into`, in order."""

    def __init__(self, given: argparse.Namespace, *, data: Path, out: Path, lock: int) -> None:
        self.given, self.data, self.out, self.lock = given, data, out, lock
        self.into: Path = given.into
        self.start = time.monotonic()
        self.thrifty = shlex.split(os.environ.get("THRIFTY", "")) or [sys.executable, "-m", "thrifty"]
        self.threads = given.threads or len(os.sched_getaffinity(0))
        git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
        self.commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None

    def everything(self) -> None:
        wanted = self.given.methods.split(",") if self.given.methods else list(METHODS)
        listed = subprocess.run([*self.thrifty, "methods"], capture_output=True, text=True, check=True).stdout.split()
        present = [name for name in wanted if re.match(r"\{?(\w+)", METHODS[name].method)[1] in listed]  # type: ignore[index]
        for name in sorted(set(wanted) - set(present)):
            print(f"{name}: left out, `thrifty methods` does not list it", flush=True)
        self.base()
        for name in present:
            self.search(name)
            self.final(name, seed=SEEDS[0])
        for seed in SEEDS[1:]:
            for name in present:
                self.final(name, seed=seed)

    def base(self) -> None:
        """The model before training, by a separate evaluation."""
        self.run("base", ["eval", MODEL, *self.judged()])

    def judged(self) -> list[str]:
        """What a final run is judged by; `eval.forgetting` is never what a method looked at."""
        rows = f"data.eval=[{{path: $DATA/snips_valid.jsonl, split: '[:{self.given.eval_rows}]'}}]"
        forgetting = "eval.forgetting=$DATA/general_text_valid.txt"
        return [
            rows,
            "eval.loss=true",
            f"eval.exact_match={self.given.eval_rows}",
            forgetting,
            f"max_length={MAX_LENGTH}",
        ]

    def search(self, name: str) -> None:
        for rate in METHODS[name].rates:
            self.short(name, rate)
        more = extension(self.into, name)
        if more:
            self.short(name, more)

    def short(self, name: str, rate: str) -> None:
        rows = "data.eval=[{path: $DATA/snips_train.jsonl, split: '[99%:]'}]"
        method = METHODS[name].search_method or METHODS[name].method
        shared = [f"per_device_train_batch_size={SEARCH_BATCH}", f"probe_units={SEARCH_UNITS}"]
        own = [f"max_steps={self.given.search_steps}", rows, "eval.loss=true", f"max_length={MAX_LENGTH}"]
        self.train(f"search-{name}-{rate}", name, method=method, rate=rate, seed=0, shared=shared, own=own)

    def final(self, name: str, *, seed: int) -> None:
        rate = best(self.into, name)
        if rate is None:
            print(f"final-{name}-{seed}: no rate of its search ended with a finite loss", flush=True)
            return
        shared = [f"per_device_train_batch_size={BATCH}"]
        own = [f"max_steps={self.given.steps}", *self.judged()]
        method = METHODS[name].method
        self.train(f"final-{name}-{seed}", name, method=method, rate=rate, seed=seed, shared=shared, own=own)

    def train(
        self, run: str, name: str, *, method: str, rate: str, seed: int, shared: list[str], own: list[str]
    ) -> None:
        """One `thrifty train`; where a key comes twice, the last counts: what a method needs, then what is `own`."""
        budget = ["budget=1%"] if METHODS[name].budget else []
        rows = "data.train=[{path: $DATA/snips_train.jsonl, split: '[:30%]'}]"
        shared = [
            f"model={MODEL}",
            rows,
            "bf16=true",
            "save_strategy=no",
            "eval.before=false",
            "logging_steps=10",
            *shared,
        ]
        mine = [f"method={method}", *budget, *METHODS[name].settings, f"learning_rate={rate}", f"seed={seed}"]
        self.run(run, ["train", *shared, *mine, *own])

    def run(self, name: str, words: list[str]) -> None:
        """One command of thrifty, unless its result is there. `words` hold $DATA, as they are kept."""
        result, failed = self.into / f"{name}.json", self.into / f"failed-{name}.json"
        if failed.exists() and self.given.retry_failed and failed.stat().st_mtime < self.given.began:
            failed.unlink()
        for path in (result, failed):
            if path.exists():
                if json.loads(path.read_text())["study"]["command"] != words:
                    raise SystemExit(f"{path} was made with other settings: delete it to run it again")
                return
        if self.given.stop_after is not None and time.monotonic() - self.start > 60 * self.given.stop_after:
            raise Stopped(f"stopped after {self.given.stop_after:g} minutes, before {name}")
        folder, log = self.out / name, self.out / f"{name}.log"
        shutil.rmtree(folder, ignore_errors=True)
        command = [*self.thrifty, *(word.replace("$DATA", str(self.data)) for word in words)]
        if words[0] == "train":
            command.append(f"output_dir={folder}")
        began = time.monotonic()
        code = self.wait(command, log=log)
        study = {"command": words, "commit": self.commit, "threads": self.threads}
        study["wall_seconds"] = round(time.monotonic() - began, 1)
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        if code == 0:
            found = json.loads((folder / "summary.json").read_text()) if words[0] == "train" else scores(lines)
            write(result, found | {"study": study})
        else:
            why = f"killed by signal {-code}" if code < 0 else lines[-1]
            write(failed, {"error": why.replace(str(self.data), "$DATA"), "exit_code": code, "study": study})
        shutil.rmtree(folder, ignore_errors=True)
        said = "done" if code == 0 else f"FAILED: {lines[-1]}"
        print(f"{time.strftime('%H:%M')} {name}: {said} ({study['wall_seconds']:.0f} s)", flush=True)

    def wait(self, command: list[str], *, log: Path) -> int:
        """The exit code. Stopped, with nothing recorded, where this process or the run was told to end."""
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1", "COLUMNS": "1000"}
        with log.open("w") as file:
            # the run holds the lock too: no second sitting begins while a run survives a killed first one
            child = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, pass_fds=[self.lock]
            )
            try:
                code = child.wait()
            except KeyboardInterrupt:
                child.terminate()
                child.wait()
                raise Stopped(f"interrupted: {log.stem} left nothing and starts again next time") from None
        if code in (-signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT):
            raise Stopped(f"{log.stem} was interrupted: it left nothing and starts again next time")
        return code


def scores(lines: list[str]) -> dict[str, Any]:
    """What `thrifty eval` printed."""
    pairs = [re.fullmatch(r"(loss|exact_match|forgetting): (\S+)", line) for line in lines]
    return {"evaluation": {"before": {pair[1]: float(pair[2]) for pair in pairs if pair}}}


def write(path: Path, value: dict[str, Any]) -> None:
    """The whole file or none."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


def losses(folder: Path, name: str) -> dict[str, float]:
    """By rate, the loss of the search so far; infinite where the run failed or diverged."""
    found = {}
    for rate in RATES:
        if (folder / f"failed-search-{name}-{rate}.json").exists():
            found[rate] = math.inf
        elif (path := folder / f"search-{name}-{rate}.json").exists():
            loss = json.loads(path.read_text())["evaluation"]["after"]["loss"]
            found[rate] = loss if math.isfinite(loss) else math.inf
    return found


def best(folder: Path, name: str) -> str | None:
    """The rate with the lowest finite loss."""
    finite = {rate: loss for rate, loss in losses(folder, name).items() if math.isfinite(loss)}
    return min(finite, key=lambda rate: finite[rate]) if finite else None


def extension(folder: Path, name: str) -> str | None:
    """The one rate beyond the grid of a method, where the best of the grid lies at its edge."""
    grid = METHODS[name].rates
    finite = {rate: loss for rate, loss in losses(folder, name).items() if rate in grid and math.isfinite(loss)}
    if not finite:
        return None
    top = min(finite, key=lambda rate: finite[rate])
    step = {grid[0]: -1, grid[-1]: 1}.get(top, 0)
    place = RATES.index(top) + step
    return RATES[place] if step and 0 <= place < len(RATES) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stop-after", type=float, metavar="MINUTES", help="start no run after so many minutes")
    parser.add_argument("--threads", type=int, metavar="N", help="OMP_NUM_THREADS of the runs (all)")
    parser.add_argument("--methods", metavar="A,B", help=f"only these of {', '.join(METHODS)}")
    parser.add_argument("--retry-failed", action="store_true", help="run again what failed in an earlier sitting")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a final run (%(default)s); other: use --into")
    parser.add_argument("--search-steps", type=int, default=SEARCH_STEPS, help="of a search run (%(default)s)")
    parser.add_argument("--eval-rows", type=int, default=EVAL_ROWS, help="of a final run (%(default)s)")
    parser.add_argument("--into", type=Path, default=HERE, help="where the JSON files go (beside this script)")
    given = parser.parse_args()
    given.began = time.time()
    unknown = set((given.methods or "smt").split(",")) - set(METHODS)
    if unknown or not {"DATA", "OUT"} <= set(os.environ):
        parser.error(f"unknown methods {sorted(unknown)}" if unknown else "set DATA and OUT in the environment")
    out = Path(os.environ["OUT"]).resolve()
    for folder in (out, given.into):
        folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started this in the background
    with open(out / "study.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another sitting, or the last run of a killed one, is still at work in {out}") from None
        try:
            Study(given, data=Path(os.environ["DATA"]).resolve(), out=out, lock=lock.fileno()).everything()
        except (Stopped, KeyboardInterrupt) as stop:
            print(stop or "interrupted", flush=True)
            sys.exit(0 if str(stop).startswith("stopped after") else 130)
    print("no run is left to make", flush=True)


if __name__ == "__main__":
    main()
