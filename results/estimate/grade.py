"""Estimates against measurements: calibrate on half of the grid, grade the rest, write the table of docs/estimate.md.

    DATA=... PYTHONPATH=. python results/estimate/grade.py           # traces every cell (minutes), then grades
    PYTHONPATH=. python results/estimate/grade.py --again            # grades what was traced

Cells: results/performance/*.json (quiet measurements of `make bench`) and results/estimate/memory.json (bytes alone).
Of every four cells in the files' order the first two calibrate; the Qwen2.5-0.5B shape calibrates nothing. DATA as for
`make bench`; without it the trainers' cells are left out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DOC = ROOT / "docs/estimate.md"
TRACED, LIVE = HERE / "traced.json", HERE / "live.json"
FILES = ("steps", "llama", "qwen", "tokens", "share", "block", "snips", "gsm8k", "memory")
BEGIN, END = "<!-- grade.py writes from here -->", "<!-- to here -->"
SETTLED = (0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6)  # of the heap; the best on the calibrating cells is taken
NEVER = "qwen"
LEFT_OUT = ("0.1%", "0.5%", "2.0%", "10.0%", "block 16", "block 32", "block 128", "columns")  # alike their neighbours
SORTS = ("products.float32", "products.bfloat16", "bytes", "mapped", "calls")
LIMITS = {"peak of what lives": 0.1, "resident peak": 0.1, "saved for backward": 0.1, "step time": 0.2}
FASTEST = {"bytes": 2.5e-11, "calls": 5e-6}  # seconds: 40 GB/s, and less than any call was seen to take
PASSES = 7.0  # as cost.py counts the optimizer


def cells() -> Iterator[dict[str, Any]]:
    """Every measured cell of a method that can be estimated, once."""
    seen = set()
    for name in FILES:
        for group in json.loads((ROOT / f"results/performance/{name}.json").read_text())["groups"]:
            for found in group["results"].values():
                spec = found["spec"]
                key = json.dumps({**spec, "name": "", "file": name if "trainer" in spec else ""}, sort_keys=True)
                if key in seen or not _known(spec):
                    continue
                seen.add(key)
                yield {"file": name, **found}
    for found in json.loads((HERE / "memory.json").read_text()):
        yield {"file": "new", **found}


def alive(row: Mapping[str, Any]) -> int | None:
    """Measured bytes alive at the peak, beyond the weights. Those of the embedded model are mapped from their file: the
    allocator never counted them."""
    weights = 0 if row["shape"] == "smollm2" else int(row["weights"])
    for one in json.loads(LIVE.read_text()):
        if one["spec"] == row["cell"]["spec"]:
            return int(one["live_peak_bytes"]) - weights
    return None


def _known(spec: Mapping[str, Any]) -> bool:
    if spec.get("trainer") == "trl" or spec.get("compiled") or spec.get("kind") in ("floor", "inference", "probe"):
        return False
    if spec.get("batches") or (spec.get("trainer") and "DATA" not in os.environ and not TRACED.is_file()):
        return False
    options = spec.get("method") if isinstance(spec.get("method"), dict) else {}
    return not any(word in str(options) for word in ("SHIRA", "input_budget")) and spec["name"] not in LEFT_OUT


def trace_cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """What predict makes of a cell, without the device."""
    from thrifty.predict.cost import on, traced
    from thrifty.predict.hardware import find_hardware

    job = _train_job(cell) if "trainer" in cell["spec"] else _step_job(cell["spec"])
    # in the step benchmarks the probe sees one batch of the same size, and is lower than the step
    found = traced(job, heap=True, probe="trainer" in cell["spec"])
    cpu = find_hardware("cpu")
    peaks = {str(s): on(found, dataclasses.replace(cpu, heap=s)) for s in SETTLED}
    alive = on(found, dataclasses.replace(cpu, heap=0.0, slack=0.0))
    return {
        "work": dict(found.mean.work),
        "optimizer": PASSES * found.trained_bytes,
        "saved": found.step.saved,
        "peaks": {share: one.beyond_weights_bytes for share, one in peaks.items()},
        "alive": alive.beyond_weights_bytes,
        "weights": found.weights,
        "moment": peaks["0.4"].moment,
        "trained": found.trained,
    }


def _step_job(spec: Mapping[str, Any]) -> Any:
    from transformers import LlamaConfig, Qwen2Config

    from benchmarks.models import _LLAMA, _QWEN
    from thrifty.core.budget import Budget
    from thrifty.core.method import parse_method
    from thrifty.predict.job import Job
    from thrifty.predict.skeleton import build
    from thrifty.run.estimate import _EMBEDDED_SIZES
    from thrifty.select.targets import targets

    shapes = {
        "smollm2": LlamaConfig(**_EMBEDDED_SIZES["smollm2-135m"]),
        "llama": LlamaConfig(**_LLAMA),
        "qwen": Qwen2Config(**_QWEN),
    }
    job = Job(
        config=shapes[spec["shape"]],
        method=parse_method(spec.get("method") or "full"),
        rows=spec["rows"],
        length=spec["tokens"],
        labels=(spec["tokens"] // 2) / spec["tokens"],
        padded=False,
        checkpointing=bool(spec.get("checkpointing")),
        probe_rows=4,
        probe_units=1,
    )
    if spec.get("share") is None:
        return job
    model = build(job)
    sizes = dict(model.named_parameters())
    numbers = sum(sizes[name].numel() for name in targets(model, "all-linear"))
    return dataclasses.replace(job, budget=Budget(count=int(spec["share"] * numbers)), probe_rows=spec["rows"])


def _train_job(cell: Mapping[str, Any]) -> Any:
    """The rows that the benchmark's steps met: the file's order, 2 warm-up steps and one for each round."""
    from benchmarks.trainers import prompt_completion
    from thrifty.run.config import load_config
    from thrifty.run.estimate import job_of
    from thrifty.run.order import row_order

    spec = cell["spec"]
    lines = (Path(os.environ["DATA"]) / f"{spec['data']}_train.jsonl").read_text().splitlines()
    steps = 2 + len(cell["seconds"])
    rows = [prompt_completion(json.loads(lines[i])) for i in row_order(len(lines), seed=0, epoch=0)[: 16 * steps]]
    file = HERE / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": "smollm2-135m",
        "data": {"train": str(file)},
        "method": spec["method"],
        "budget": spec.get("budget"),
        "per_device_train_batch_size": spec["batch"],
        "train_sampling_strategy": "sequential",
        "bf16": spec["bf16"],
        "activation_checkpointing": spec["checkpointing"],
        "learning_rate": 1e-4,
    }
    job = job_of(load_config(config))
    file.unlink()
    return job


def fit(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of a unit of each sort of work, fitted to the calibrating cells, relative errors alike."""
    timed = [row for row in rows if row["calibrates"] and row["seconds"]]
    matrix = np.array([_amounts(row) for row in timed]) / np.array([[row["seconds"]] for row in timed])
    scale = np.maximum(matrix.max(axis=0), 1e-30)  # of a sort of work that no cell has
    least = np.array([FASTEST.get(sort, 0.0) for sort in SORTS])
    found = lsq_linear(matrix / scale, np.ones(len(timed)), bounds=(least * scale, np.inf))
    return dict(zip(SORTS, (found.x / scale).tolist(), strict=True))


def fit_heap(rows: list[dict[str, Any]]) -> str:
    """The share of settled ends with the least median error of the calibrating cells."""
    mine = [row for row in rows if row["calibrates"]]
    errors = {
        str(share): statistics.median(abs(row["peaks"][str(share)] / row["cell"]["peak_bytes"] - 1) for row in mine)
        for share in SETTLED
    }
    print(errors)
    return min(errors, key=lambda share: errors[share])


def _amounts(row: Mapping[str, Any]) -> list[float]:
    work = dict(row["work"])
    for dtype in ("float32", "bfloat16"):  # attention goes at the products' rate: the fit cannot tell them apart
        work[f"products.{dtype}"] = work.get(f"products.{dtype}", 0) + work.get(f"attention.{dtype}", 0)
    work["bytes"] += row["optimizer"]
    return [work.get(sort, 0.0) for sort in SORTS]


def graded() -> list[dict[str, Any]]:
    """All cells with what was traced."""
    kept = json.loads(TRACED.read_text()) if TRACED.is_file() else {}
    rows = []
    for order, cell in enumerate(cells()):
        key = json.dumps([cell["file"], cell["spec"]], sort_keys=True)
        if key not in kept:
            if "--again" in sys.argv:
                continue
            kept[key] = trace_cell(cell)
            TRACED.write_text(json.dumps(kept, indent=1) + "\n")
            print(cell["spec"]["name"], kept[key]["moment"], flush=True)
        seconds = statistics.median(cell["seconds"]) if cell.get("seconds") else None
        shape = cell["spec"].get("shape", "smollm2")
        row = {"cell": cell, "seconds": seconds, "shape": shape, **kept[key]}
        rows.append(row | {"calibrates": order // 2 % 2 == 0 and shape != NEVER})
    return rows


def _line(row: Mapping[str, Any], rates: Mapping[str, float]) -> tuple[str, list[float | None]]:
    """A line of the table, and the errors in the order of LIMITS."""
    cell, spec = row["cell"], row["cell"]["spec"]
    lives, peak = alive(row), row["peak"] / cell["peak_bytes"] - 1
    living = None if lives is None else row["alive"] / lives - 1
    saved = row["saved"] / cell["saved_bytes"] - 1 if cell.get("saved_bytes") else None
    time = None
    if row["seconds"]:
        time = sum(a * rates[sort] for a, sort in zip(_amounts(row), SORTS)) / row["seconds"] - 1
    where = spec.get("data") or f"{spec['rows']} x {spec['tokens']}"
    kind = ("bf16" if spec.get("bf16") else "") + (" checkpointing" if spec.get("checkpointing") else "")
    cells_ = [
        spec["name"] + (f" ({kind.strip()})" if kind.strip() else ""),
        f"{row['shape']}, {where}",
        "yes" if row["calibrates"] else "",
        "" if lives is None else f"{lives / 2**20:,.0f}",
        "" if living is None else _signed(living, 0.1),
        f"{cell['peak_bytes'] / 2**20:,.0f}",
        _signed(peak, 0.1),
        "" if saved is None else _signed(saved, 0.1),
        "" if row["seconds"] is None else f"{row['seconds']:.2f}",
        "" if time is None else _signed(time, 0.2),
    ]
    return "| " + " | ".join(cells_) + " |", [living, peak, saved, time]


def _signed(share: float, limit: float) -> str:
    text = f"{100 * share:+.1f} %"
    return f"**{text}**" if abs(share) > limit else text


def _summary(errors: Mapping[str, list[float]]) -> list[str]:
    lines = []
    for name, found in errors.items():
        if found:
            inside = sum(abs(e) <= LIMITS[name] for e in found)
            worst = max(found, key=abs)
            lines.append(
                f"- {name}: {inside} of {len(found)} within {100 * LIMITS[name]:.0f} %, median error "
                f"{100 * statistics.median(map(abs, found)):.1f} %, worst {100 * worst:+.1f} %"
            )
    return lines


def main() -> int:
    rows = graded()
    rates, settled = fit(rows), fit_heap(rows)
    for row in rows:
        row["peak"] = row["peaks"][settled]
    head = (
        "| method | model, batch | calibrates | alive MiB | error | resident MiB | error | saved, error | s | error |"
    )
    lines = [head, "|" + "---|" * 10]
    groups: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        line, errors = _line(row, rates)
        lines.append(line)
        which = "a shape never used" if row["shape"] == NEVER else "calibrating" if row["calibrates"] else "graded"
        group = groups.setdefault(which, {name: [] for name in LIMITS})
        for name, error in zip(LIMITS, errors, strict=True):
            if error is not None:
                group[name].append(error)
    text = [BEGIN, ""]
    for which in ("graded", "a shape never used", "calibrating"):
        if which in groups:
            text += [f"{which[0].upper()}{which[1:]}:", "", *_summary(groups[which]), ""]
    units = ", ".join(f"{sort} {value:.3g} s" for sort, value in rates.items())
    text += [*lines, "", f"Seconds of one FLOP, byte or call: {units}. Share of settled ends: {settled}.", "", END]
    before, _, rest = DOC.read_text().partition(BEGIN)
    DOC.write_text(before + "\n".join(text) + rest.partition(END)[2])
    print("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
