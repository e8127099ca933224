"""Rows and run files for the objectives that TRL trains, and what their runs leave."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_run import configuration
from transformers import AutoModelForCausalLM

from thrifty.delta import Delta
from thrifty.run.metrics import read_metrics
from thrifty.run.train import Run

__all__ = ["GRPO", "LORA", "check_delta", "judged", "logged", "pair", "prompt", "values"]

LORA = {"peft": {"peft_type": "LORA", "r": 2, "target_modules": "all-linear", "exclude_modules": ["lm_head"]}}
GRPO = {"num_generations": 4, "max_completion_length": 6, "temperature": 1.0}
Make = Callable[[int, int], dict[str, Any]]


def pair(a: int, b: int) -> dict[str, Any]:
    return {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": f"-{a}"}


def judged(a: int, b: int) -> dict[str, Any]:
    return {"prompt": f"{a}+{b}=", "completion": str(a + b) if b % 2 else f"-{a}", "label": bool(b % 2)}


def prompt(a: int, b: int) -> dict[str, Any]:
    return {"prompt": f"{a}+{b}=", "completion": str(a + b), "digit": "7"}


def write(file: Path, make: Make, *, rows: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    made = [make(draw.randrange(1000), draw.randrange(100)) for _ in range(rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return str(file)


def values(folder: Path, objective: Any, make: Make, **changes: Any) -> dict[str, Any]:
    data = {"train": write(folder / "rows.jsonl", make, rows=16), "eval": write(folder / "held.jsonl", make, rows=6)}
    settings = {"data": data, "logging_steps": 1, "eval": {"loss": True, "before": True}, "learning_rate": 0.02}
    return configuration(folder, objective=objective, **{"max_steps": 4, "budget": 0.3, **settings, **changes})


def logged(folder: Path, key: str) -> list[float]:
    return [entry[key] for entry in read_metrics(folder / "out" / "metrics.jsonl") if key in entry]


def check_delta(folder: Path, run: Run) -> None:
    """The delta is exact, and nothing else moved."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    original = {name: p.detach().clone() for name, p in base.named_parameters()}
    Delta.load(folder / "out" / "delta").apply(base)
    trained = dict(run.model.named_parameters())
    for name, p in base.named_parameters():
        assert torch.equal(p, trained[name]), name
        assert torch.equal(p, original[name]) == (name not in run.delta.plan), name
