"""The process of one contender: `python -m benchmarks.worker '{"name": ..., ...}'`, driven by `rounds.py`."""

from __future__ import annotations

import json
import os
import sys
import warnings
from functools import partial

from .gate import Gate
from .machine import keep_heap, pin

_WARM_UP = 1  # step: allocators, shared strips, optimizer state


def main() -> None:
    spec = json.loads(sys.argv[1])
    gate = Gate()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    pin(spec["threads"])
    if "trainer" in spec:
        from .trainers import run_trainer

        gate.say(imported=True)
        gate.wait()
        gate.say(record=run_trainer(spec, gate))
        return
    from .steps import step_contender

    keep_heap()

    gate.say(imported=True)
    gate.wait()
    contender = step_contender(spec)
    for _ in range(_WARM_UP):
        contender.step()
    gate.say(ready=True)
    gate.loop(partial(contender.steps, spec.get("batches", 1)), wake=contender.wake)
    gate.say(record=contender.record())


if __name__ == "__main__":
    main()
