"""Where a step's time goes: `python -m benchmarks profile` prints milliseconds of each kind of operation, by contender.

Each contender of the suite `steps` in a process of its own, one after the other, three steps under torch's profiler,
which makes everything somewhat slower; self times, so that the rows add up to the step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from .machine import keep_heap, pin
from .suites import SUITES

_STEPS = 3
# the first whose words are in an operation's name counts
_KINDS = {
    "the tuned layers' own Python": ("_InPlace",),
    "optimizer": ("AdamW", "adamw", "Optimizer"),
    "attention": ("attention",),
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "copies, gathers, casts": ("copy", "index", "gather", "scatter", "cat", "clone", "fill", "zero", "sparse", "::to"),
    "element by element and sums": ("aten::",),
    "everything else": ("",),
}


def profile(name: str) -> dict[str, float]:
    """Milliseconds of a step by kind."""
    import torch
    from torch.profiler import ProfilerActivity

    from .steps import step_contender

    (spec,) = (spec for spec in SUITES["steps"]()[0]["specs"] if spec["name"] == name)
    pin(os.cpu_count() or 1)
    keep_heap()
    contender = step_contender(spec)
    for _ in range(3):
        contender.step()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(_STEPS):
            contender.step()
    kinds = dict.fromkeys(_KINDS, 0.0)
    for event in found.key_averages():
        kind = next(kind for kind, words in _KINDS.items() if any(word in event.key for word in words))
        kinds[kind] += event.self_cpu_time_total / 1000 / _STEPS
    return kinds


def profile_table() -> str:
    """A Markdown table of all contenders of the suite `steps`."""
    columns = {}
    for spec in SUITES["steps"]()[0]["specs"]:
        command = [sys.executable, "-m", "benchmarks.profile", spec["name"]]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        columns[spec["name"]] = json.loads(done.stdout.splitlines()[-1])
    rows = [["milliseconds", *columns], ["---"] * (len(columns) + 1)]
    rows += [[kind, *(f"{column[kind]:,.0f}" for column in columns.values())] for kind in _KINDS]
    rows += [["together", *(f"{sum(column.values()):,.0f}" for column in columns.values())]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(json.dumps(profile(sys.argv[1])))
