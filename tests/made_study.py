"""Folders of made-up run records in the shape that a study writes, so that reports are tested without training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

QUALITY = {"full": 0.45, "smt": 0.42, "lora": 0.36, "random_blocks": 0.2}
KINDS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ROWS = 200


def write_run(folder: Path, record: Mapping[str, Any]) -> None:
    """One record, named as the study names it."""
    path = folder / "runs" / f"{record['run_info']['experiment_name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record), encoding="utf-8")


def run(
    stage: str,
    method: str | None = None,
    *,
    task: str = "snips",
    budget: str | None = "1%",
    seed: int = 0,
    rate: float | None = None,
    created: str = "2026-11-22T15:00:00+00:00",
    **train_info: Any,
) -> dict[str, Any]:
    """A record; `train_info` gives what the run found, `error` a failure's message."""
    error = train_info.pop("error", "")
    name = "-".join(str(part) for part in (stage, task, method, budget, rate if stage == "search" else f"s{seed}"))
    found = {"status": "failed"} if error else {"status": "success", "metrics": [], "measures": {}, "chosen": {}}
    return {
        "run_info": {
            "created_at": created, "total_time": 100.0, "experiment_name": name.replace("%", "pct").replace("/", "_"),
            "train_config": {"model": "tiny", "data": "$DATA/snips"}, "peft_config": None, "error_msg": error,
            "stage": stage, "task": task, "method": method, "budget": budget, "learning_rate": rate, "seed": seed,
            "threads": 1, "commit": "abc1234", "spec_sha256": "0" * 64,
        },
        "train_info": found | train_info,
        "meta_info": {
            "model_info": {"sha": None, "created_at": None}, "dataset_info": {"train": {"sha": "d" * 8}},
            "package_info": {"torch-version": "2.13.0", "thrifty-version": "0.1.0"},
            "system_info": {"system": "Linux", "release": "6", "machine": "x86_64", "processor": "", "cpus": 2},
            "pytorch_info": "PyTorch built with: <AVX2>",
        },
    }  # fmt: skip


def rows_of(right: np.ndarray) -> list[list[float]]:
    """[1 or 0, 1] of each row."""
    return [[float(x), 1.0] for x in right]


def losses_of(source: np.random.Generator, level: float, rows: int = ROWS) -> list[list[float]]:
    """[summed loss, labels] of each row."""
    labels = source.integers(5, 30, size=rows)
    return [[float(level * n * (1 + 0.1 * source.normal())), float(n)] for n in labels]


def metrics_of(best: float, *, probe: float, speed: float, steps: int = 80) -> list[dict[str, float]]:
    """A loss that falls from 2 towards `best`, every 10 steps; the clock starts with the probe."""
    points = []
    for step in range(0, steps + 1, 10):
        loss = best + (2.0 - best) * float(np.exp(-step / 20))
        point = {"step": step, "train time": probe + speed * step, "eval loss": loss}
        points.append(point if step == 0 else point | {"train loss": loss * 0.95})
    return points


def final(
    method: str,
    *,
    task: str = "snips",
    budget: str = "1%",
    seed: int = 0,
    quality: float | None = None,
    trainable: int = 1_300_000,
    hard: np.ndarray | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A final run whose share of right answers is about `quality`; `hard` holds how hard each row is, 0 to 1."""
    quality = QUALITY.get(method, 0.3) if quality is None else quality
    source = np.random.default_rng([seed, *method.encode(), *budget.encode()])
    hard = np.random.default_rng(0).random(ROWS) if hard is None else hard
    right = hard + 0.05 * source.normal(size=len(hard)) < quality
    probe = 0.0 if method in ("lora", "full") else 12.0
    metrics = metrics_of(0.4 - 0.7 * quality, probe=probe, speed=3.0 if method == "full" else 2.0)
    share = {"smt": 0.02, "full": 1.0}.get(method, 0.0)
    chosen = {
        f"model.layers.{layer}.{kind}.weight": [int(share * 331776 * (0.5 + layer / 4 + i / 6)), 331776]
        for layer in range(4) for i, kind in enumerate(KINDS) if method == "smt"
    }  # fmt: skip
    info = {
        "accelerator_memory_max": 300e6 + 12 * trainable, "accelerator_memory_reserved_avg": 300e6,
        "accelerator_memory_reserved_99th": 320e6, "train_time": metrics[-1]["train time"], "probe_seconds": probe,
        "file_size": 4 * trainable, "num_trainable_params": trainable, "num_total_params": 134_515_008, "steps": 80,
        "tokens": 90_000, "tokens_per_second": 500.0, "plan_sha256": "1" * 64, "metrics": metrics, "chosen": chosen,
        "measures": {
            "exact_match": {"rows": rows_of(right)},
            "loss": {"rows": losses_of(source, 0.4 - 0.7 * quality)},
            "forgetting": {"rows": losses_of(np.random.default_rng(1), 3.0 + 0.2 * quality, 60)},
        },
    }  # fmt: skip
    return run("final", method, task=task, budget=budget, seed=seed, rate=0.003, **(info | more))


def base(task: str = "snips") -> dict[str, Any]:
    """The model before training."""
    measures = {
        "exact_match": {"rows": rows_of(np.zeros(ROWS))},
        "loss": {"rows": losses_of(np.random.default_rng(2), 2.0)},
        "forgetting": {"rows": losses_of(np.random.default_rng(1), 3.0, 60)},
    }
    return run("base", None, task=task, budget=None, measures=measures)


def search(method: str, losses: Mapping[float, float | None], **more: Any) -> list[dict[str, Any]]:
    """The search of a learning rate; None for a run that failed."""
    return [
        run("search", method, rate=rate, error="diverged", **more)
        if loss is None
        else run("search", method, rate=rate, measures={"loss": {"rows": [[loss, 1.0]]}}, **more)
        for rate, loss in losses.items()
    ]


def make_study(
    folder: Path, *, budgets: tuple[str, ...] = ("0.5%", "2%", "8%"), seeds: tuple[int, ...] = (0, 1)
) -> Path:
    """smt, lora and random blocks at all budgets and seeds, full at its own; one run failed, one search at its edge."""
    records = [base()]
    for method in ("full", "smt", "lora", "random_blocks"):
        for i, budget in enumerate(("own",) if method == "full" else budgets):
            grow = {"lora": -0.06, "smt": 0.03}.get(method, 0.0) * i
            trainable = 134_515_008 if method == "full" else int(134_515_008 * float(budget.rstrip("%")) / 100)
            worst = 1e-2 if method == "smt" else None
            records += search(method, {1e-3: 0.5, 3e-3: 0.4, 1e-2: 0.3 if worst else None}, budget=budget)
            records += [
                final(method, budget=budget, seed=s, quality=QUALITY[method] + grow, trainable=trainable) for s in seeds
            ]
    records.append(run("final", "smt", budget=budgets[0], seed=seeds[-1], rate=0.003, error="MemoryError: no room"))
    for record in records:
        write_run(folder, record)
    (folder / "study.yaml").write_text("tasks: {snips: {train: $DATA/snips}}\nmethods: {smt: smt}\n", encoding="utf-8")
    return folder
