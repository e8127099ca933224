"""Estimate every run of configs/paper/README.md, and a few more, on one GPU; write the tables of docs/scale.md.

    python results/scale/estimate.py            # what estimates.json lacks (a minute each), then the tables
    python results/scale/estimate.py --again    # the tables alone

The same as `thrifty estimate FILE model=configs/paper/shapes/... data=null max_steps=... --hardware ... --fit ...`, but
that a step is traced once for both devices. From the project's folder.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DOC, KEPT = ROOT / "docs/scale.md", HERE / "estimates.json"
README = ROOT / "configs/paper/README.md"
BEGIN, END = "<!-- estimate.py writes from here -->", "<!-- to here -->"
DEVICES = {"rtx-4090": "24GB", "a100-80gb": "80GB"}
FITTED = "rtx-4090"  # where --fit is asked in any case; on the others, for what does not fit
ROWS = {"Commonsense170K": 170_420, "Math10K": 9_919}
EPOCHS = 3
_MIXTRAL = "configs/paper/shapes/mixtral-8x7b"
# beside the paper's: what makes full fine-tuning fit, and a mixture of experts
MORE = (
    "configs/paper/full.yaml model=configs/paper/shapes/llama-7b optim=adafactor",
    f"configs/paper/smt.yaml model={_MIXTRAL} budget=58_327_040",
    f"configs/paper/smt.yaml model={_MIXTRAL} budget=58_327_040 method.smt.target_modules=all-linear",
    f"configs/paper/full.yaml model={_MIXTRAL}",
)
NAMES = {
    "llama-7b": "LLaMA-7B",
    "llama-13b": "LLaMA-13B",
    "llama-2-7b": "LLaMA2-7B",
    "llama-3-8b": "LLaMA3-8B",
    "mixtral-8x7b": "Mixtral 8x7B",
}
PARTS = ("weights", "trained values", "gradients", "optimizer", "activations", "head", "working", "probe")


def shapes() -> dict[str, str]:
    """Hub id -> folder of its shape, as the table of models says."""
    found = re.findall(r"\| `([\w./-]+)`[^|]*\| `(shapes/[\w.-]+)` \|", README.read_text(encoding="utf-8"))
    return {hub: f"configs/paper/{shape}" for hub, shape in found}


def commands() -> list[str]:
    """The runs of the README, each as file and settings for an estimate: the shape for the model, no output."""
    lines = re.findall(r"^thrifty train (configs/paper/.*)$", README.read_text(encoding="utf-8"), re.MULTILINE)
    found = []
    for line in lines:
        words = [word for word in shlex.split(line) if not word.startswith("output_dir=")]
        model = next(word for word in words if word.startswith("model="))
        words[words.index(model)] = f"model={shapes()[model.removeprefix('model=')]}"
        found.append(" ".join(words))
    return found


def job(command: str) -> Any:
    """What is to be estimated; three passes over Commonsense170K."""
    from thrifty.run.config import load_config
    from thrifty.run.estimate import job_of

    file, *settings = command.split()
    found = job_of(load_config(ROOT / file, [*settings, "data=null"], needs_training_data=False))
    return dataclasses.replace(found, steps=steps(found, ROWS["Commonsense170K"]))


def steps(one: Any, rows: int) -> int:
    """Of `EPOCHS` passes over `rows`."""
    return EPOCHS * -(-rows // (one.rows * one.accumulation))


def estimate(command: str) -> dict[str, Any]:
    """One run on each device, what would fit, and the processor's seconds that the estimate took."""
    from thrifty.predict.cost import on, traced
    from thrifty.predict.fit import fit_job, parse_bytes
    from thrifty.predict.hardware import find_hardware

    begin, one = time.process_time(), job(command)
    found = traced(one)
    answer: dict[str, Any] = {"rows": one.rows, "accumulation": one.accumulation, "devices": {}}
    answer["seconds_to_estimate"] = round(time.process_time() - begin, 1)
    for name, memory in DEVICES.items():
        device = find_hardware(name)
        result = on(found, device)
        hours = {
            data: (result.probe_seconds + steps(one, rows) * result.step_seconds) / 3600 for data, rows in ROWS.items()
        }
        fit = None
        if name == FITTED or not result.fits:
            fits = fit_job(one, device, parse_bytes(memory))
            fit = {"rows": fits.rows, "length": fits.length, "budget": fits.budget and fits.budget.fraction}
        answer["devices"][name] = {"estimate": result.to_dict(), "hours": hours, "fit": fit}
    return answer


def described(command: str) -> tuple[str, str]:
    """The model, and the method in words."""
    file, *settings = command.split()
    values = dict(word.split("=", 1) for word in settings)
    model = NAMES[Path(values.pop("model")).name]
    name = {"smt": "SMT", "lora": "LoRA", "dora": "DoRA", "full": "full"}[Path(file).stem]
    more = []
    if name == "SMT" and "method.smt.target_modules" in values:
        more.append("experts too")
    elif name == "SMT" and "Mixtral" in model:
        more.append("Q, K, V")
    if "optim" in values:
        more.append(values["optim"])
    return model, f"{name}, {', '.join(more)}" if more else name


def table(kept: dict[str, Any]) -> list[str]:
    """One line a run."""
    head = ["model", "method", "trained", "share", "peak GB"]
    for name in DEVICES:
        head += [f"{name}: tokens/s", *(f"hours, {data}" for data in ROWS)]
    lines = [_row(head), "|" + "---|" * len(head)]
    for command, found in kept.items():
        first = next(iter(found["devices"].values()))["estimate"]
        share = 100 * first["trained"] / first["parameters"]
        cells = [*described(command), f"{first['trained']:,}", f"{share:.3g} %", f"{first['peak_bytes'] / 1e9:.1f}"]
        for one in found["devices"].values():
            e, fits = one["estimate"], one["estimate"]["fits"]
            cells += [f"{e['tokens_per_second']:,.0f}" if fits else "does not fit"]
            cells += [_hours(hours) if fits else "" for hours in one["hours"].values()]
        lines.append(_row(cells))
    return lines


def _hours(hours: float) -> str:
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.1f}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def parts(kept: dict[str, Any]) -> list[str]:
    """The memory of LLaMA-7B's runs, part by part, at the peak."""
    chosen = {c: f for c, f in kept.items() if c.split()[1].endswith("/llama-7b")}
    lines = [_row(["LLaMA-7B, GB", *PARTS, "rest", "moment"]), "|" + "---|" * (len(PARTS) + 3)]
    for command, found in chosen.items():
        e = next(iter(found["devices"].values()))["estimate"]
        shown = [e["memory"].get(part, 0) for part in PARTS]
        cells = [f"{size / 1e9:.1f}" for size in (*shown, e["peak_bytes"] - sum(shown))]
        lines.append(_row([described(command)[1], *cells, e["moment"]]))
    return lines


def fitting(kept: dict[str, Any]) -> list[str]:
    """What --fit says: the largest of each, the rest as configured."""
    lines = [
        _row(["memory", "model", "method", "share", "rows at a time", "or tokens a row", "or budget"]),
        "|" + "---|" * 7,
    ]
    nothing = []
    for name, memory in DEVICES.items():
        none = []
        for command, found in kept.items():
            fit, e = found["devices"][name]["fit"], found["devices"][name]["estimate"]
            model, method = described(command)
            if fit is None:
                continue
            if not any(fit.values()):
                none.append(f"{model} ({method})")
                continue
            share = f"{100 * e['trained'] / e['parameters']:.3g} %"
            budget = f"{100 * fit['budget']:.1f} %" if fit["budget"] else "none" if "smt" in command else ""
            cells = [str(fit[key] or "none") for key in ("rows", "length")]
            lines.append(_row([memory.replace("GB", " GB"), model, method, share, *cells, budget]))
        nothing += ["", f"Into {memory.replace('GB', ' GB')} nothing fits, not even one row, of {', '.join(none)}."]
    return [*lines, *nothing]


def page(kept: dict[str, Any]) -> str:
    """The block between the markers."""
    longest = max(found["seconds_to_estimate"] for found in kept.values())
    text = [BEGIN, "", "## Every run", "", *table(kept), ""]
    text += ["## Where the memory goes", "", *parts(kept), ""]
    text += ["## What would fit", "", *fitting(kept), ""]
    text += [f"The longest of these estimates took {longest:.0f} seconds of one processor.", "", END]
    return "\n".join(text)


def main() -> int:
    kept: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    every = [*commands(), *MORE]
    for command in every:
        if command not in kept and "--again" not in sys.argv:
            kept[command] = estimate(command)
            KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            print(command, flush=True)
    kept = {command: kept[command] for command in every if command in kept}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    before, _, rest = DOC.read_text(encoding="utf-8").partition(BEGIN)
    DOC.write_text(before + page(kept) + rest.partition(END)[2], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
