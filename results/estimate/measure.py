"""Peaks and saved bytes that results/performance lacks: activation checkpointing, and longer rows; and of all cells
whose steps it can make, the peak of what lives, as PyTorch's own allocator counts it (on a GPU that is
`torch.cuda.max_memory_allocated`).

    PYTHONPATH=. python results/estimate/measure.py     # writes results/estimate/memory.json and live.json

Each cell is a child of its own, forked after the libraries are loaded; bytes only, no seconds. One thread: on a busy
machine steps are slow, their memory is the same.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.machine import keep_heap
from benchmarks.steps import step_contender
from results.estimate.grade import cells

_FILE, _LIVE = (Path(__file__).with_name(name) for name in ("memory.json", "live.json"))
_STEPS = 2
_SMT = {"smt": {"scope": "per_matrix", "block_size": 64}}
_LORA = {"peft": {"peft_type": "LORA", "r": 17, "lora_alpha": 34}}
_CONTENDERS: tuple[dict[str, Any], ...] = (
    {"name": "SMT 5 %", "kind": "method", "method": _SMT, "share": 0.05},
    {"name": "LoRA r17", "kind": "method", "method": _LORA},
    {"name": "full", "kind": "full"},
)
_SIZES = ({"rows": 4, "tokens": 128, "checkpointing": True}, {"rows": 1, "tokens": 512})


def _measure(spec: dict[str, Any]) -> dict[str, Any]:
    keep_heap()
    contender = step_contender(spec)
    contender.steps(_STEPS)
    return {"spec": spec, **contender.record()}


def _measure_live(spec: dict[str, Any]) -> dict[str, Any]:
    """The peak during the steps, the model's weights included: what was made since before it was built."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        contender = step_contender(spec)
        with record_function("the steps"):
            contender.steps(_STEPS)
    found = _flat(profiler.profiler.kineto_results.experimental_event_tree())
    start = next(event.start_time_ns for event in found if event.name == "the steps")
    here = [e for e in found if e.tag == _EventType.Allocation and e.start_time_ns >= start]
    return {"spec": spec, "live_peak_bytes": max(event.extra_fields.total_allocated for event in here)}


def _flat(events: list[Any]) -> list[Any]:
    return [one for event in events for one in (event, *_flat(event.children))]


def _in_child(measure: Callable[[dict[str, Any]], dict[str, Any]], spec: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    if os.fork() == 0:
        with os.fdopen(writing, "w") as file:
            json.dump(measure(spec), file)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.wait()
    found: dict[str, Any] = json.loads(text)
    return found


def main() -> int:
    torch.set_num_threads(1)
    done = json.loads(_FILE.read_text()) if _FILE.is_file() else []
    for size in _SIZES:
        for contender in _CONTENDERS:
            spec = {**contender, "shape": "smollm2", **size}
            if all(one["spec"] != spec for one in done):
                done.append(_in_child(_measure, spec))
                _FILE.write_text(json.dumps(done, indent=1) + "\n")
                print(spec["name"], size, f"{done[-1]['peak_bytes'] / 2**20:,.0f} MiB", flush=True)
    live = json.loads(_LIVE.read_text()) if _LIVE.is_file() else []
    for spec in (cell["spec"] for cell in cells() if "trainer" not in cell["spec"]):
        if all(one["spec"] != spec for one in live):
            live.append(_in_child(_measure_live, spec))
            _LIVE.write_text(json.dumps(live, indent=1) + "\n")
            print(spec["name"], spec["shape"], f"{live[-1]['live_peak_bytes'] / 2**20:,.0f} MiB alive", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
