"""Interleaved rounds: every contender in a process of its own takes one step in each round, one after the other."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["measure", "ratio"]


class _Worker:
    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.name = spec["name"]
        command = [sys.executable, "-m", "benchmarks.worker", json.dumps(spec)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with exit code {self.process.wait()}; its output is above")
        message: dict[str, Any] = json.loads(line)
        return message

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()


def measure(specs: Sequence[Mapping[str, Any]], *, rounds: int) -> dict[str, Any]:
    """`{name: {"spec", "seconds": [of each round], ...}}`.

    Contenders load one after the other, then each takes one step per round in turn. The record that a contender makes
    of itself at the end (bytes, counts) is added to what was timed.
    """
    workers: list[_Worker] = []
    results: dict[str, Any] = {spec["name"]: {"spec": dict(spec), "seconds": []} for spec in specs}
    try:
        for spec in specs:
            workers.append(_Worker(spec))
        for worker in workers:
            worker.read()  # imported, which they may do side by side; threads that wait for each other would not
        for worker in workers:
            worker.tell("go")
            worker.read()
            sys.stderr.write(f"  {worker.name} is ready\n")
        for _ in range(rounds):
            for worker in workers:
                worker.tell("go")
                results[worker.name]["seconds"].append(worker.read()["seconds"])
        for worker in workers:
            worker.tell("stop")
            try:
                results[worker.name] |= worker.read()["record"]
            except RuntimeError as error:  # what was timed stands
                results[worker.name]["failed"] = str(error)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
    return results


def ratio(results: Mapping[str, Any], one: str, other: str) -> tuple[float, float, float]:
    """Median of the per-round ratios of the seconds of `one` to those of `other`, and their quartiles."""
    pairs = zip(results[one]["seconds"], results[other]["seconds"], strict=True)
    ratios = sorted(a / b for a, b in pairs)
    if len(ratios) < 2:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high
