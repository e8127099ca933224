"""Write docs/results/where.md from the JSON files beside this script; what stands below its `<!-- end -->` is kept.

python results/where/table.py [FOLDER OF THE JSON FILES [DOCUMENT]]
"""

import json
import math
import re
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from study import (
    BATCH,
    EVAL_ROWS,
    HERE,
    MAX_LENGTH,
    METHODS,
    SEARCH_BATCH,
    SEARCH_STEPS,
    SEARCH_UNITS,
    SEEDS,
    STEPS,
    best,
    extension,
    losses,
)

END = "<!-- end -->"
COLUMNS = (
    "method",
    "trained",
    "share",
    "learning rate",
    "loss",
    "exact match",
    "forgetting",
    "s a step",
    "probe, s",
    "peak, GiB",
)

INTRO = f"""\
# Where to train: all methods on one task

SmolLM2-135M-Instruct (the embedded model, bfloat16 autocast) trained on SNIPS requests in chat form
(`$DATA/snips_train.jsonl`, SNIPS NLU benchmark in the SlotGated-SLU split; its first 30 %) for {STEPS} steps of {BATCH}
rows, AdamW, linear decay. A seed decides the order of the rows, the same for all methods, and what is drawn at random.

- **loss** (per answer token) and **exact match** (greedy answers): the first {EVAL_ROWS} rows of
  `$DATA/snips_valid.jsonl`.
- **forgetting**: how much the loss per token rises on `$DATA/general_text_valid.txt` (WikiText-2, 64 windows of
  {MAX_LENGTH} tokens), which no method looks at; LoKI and senszo take `general_text_train.txt`.
- **s a step**: seconds of training without the probe, over the steps (a mean: what is done once during training, such
  as choosing anew, is in it). **probe**: seconds of looking at gradients or text before the first step; choosing by it
  (sorting, LIFT's decomposition) is in neither. **peak**: resident bytes of probe and training above the loaded model,
  the highest of the seeds. All from the run's `summary.json`. The machine had other work beside these runs: seconds
  are rough, and [docs/performance.md](../performance.md) compares steps properly.
- **learning rate**: of three a factor of about three apart, and a fourth where the best lay at the edge, the one with
  the lowest loss on rows 99 %-100 % of the *training* file after {SEARCH_STEPS} steps of
  {SEARCH_BATCH} rows and a probe of {SEARCH_UNITS} units (seed 0).

Loss, exact match and forgetting are given by seed ({", ".join(map(str, SEEDS))}); methods are in the order of their
mean loss. With {EVAL_ROWS} rows the standard error of an exact match of .3 is {math.sqrt(0.3 * 0.7 / EVAL_ROWS):.3f}.

```bash
DATA=... OUT=/tmp/where python results/where/study.py    # resumable; --stop-after MINUTES ends between two runs
python results/where/table.py                            # writes this page from results/where/*.json
```
"""


def load(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def head(columns: tuple[str, ...]) -> list[str]:
    return [row(list(columns)), "|---" * len(columns) + "|"]


class Found:
    """What is in the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        base = load(folder / "base.json")
        self.base: dict[str, float] = base["evaluation"]["before"] if base else {}
        self.failed = {p.stem.removeprefix("failed-"): load(p) or {} for p in sorted(folder.glob("failed-*.json"))}

    def finals(self, name: str) -> list[dict[str, Any]]:
        runs = (load(self.folder / f"final-{name}-{seed}.json") for seed in SEEDS)
        return [run for run in runs if run]

    def hopeless(self, name: str) -> bool:
        """Whether the whole search was made and no rate of it ended with a finite loss."""
        return len(losses(self.folder, name)) >= len(METHODS[name].rates) and best(self.folder, name) is None

    def is_failed(self, name: str) -> bool:
        return self.hopeless(name) or any(f"final-{name}-{seed}" in self.failed for seed in SEEDS)

    def progress(self) -> str:
        """How many of the runs are over. A search that may yet be extended counts as its grid."""
        over, planned = int(bool(self.base)), 1
        for name, entry in METHODS.items():
            searched = losses(self.folder, name)
            planned += len(set(entry.rates) | set(searched) | {extension(self.folder, name) or entry.rates[0]})
            over += len(searched)
            if not self.hopeless(name):
                planned += len(SEEDS)
                over += sum(f"final-{name}-{seed}" in self.failed for seed in SEEDS) + len(self.finals(name))
        per_seed = [sum((self.folder / f"final-{name}-{s}.json").exists() for name in METHODS) for s in SEEDS]
        seeds = ", ".join(f"{n} of {len(METHODS)} methods with seed {s}" for s, n in zip(SEEDS, per_seed))
        state = "The study is complete" if over == planned else "The study is under way; the command above goes on"
        return f"**{state}: {over} of {planned} runs are over; {seeds}; {len(self.failed)} runs failed.**"

    def group(self, budget: bool) -> list[str]:
        names = [name for name, entry in METHODS.items() if entry.budget == budget]
        lines = head(COLUMNS)
        if self.base:
            before = self.base
            lines.append(row(["before training", "0", "", "", f"{before['loss']:.4f}", f"{before['exact_match']:.3f}"]))
            lines[-1] += f" {before['forgetting']:.4f} (the loss) | | | |"
        for name in sorted(names, key=lambda name: mean([loss(run) for run in self.finals(name)] or [math.inf])):
            lines.append(self.line(name))
        return lines

    def line(self, name: str) -> str:
        runs = self.finals(name)
        if not runs:
            state = "failed" if self.is_failed(name) else "not run"
            return row([name, state, *[""] * (len(COLUMNS) - 2)])
        after = [run["evaluation"]["after"] for run in runs]
        forgot = [f"{a['forgetting'] - self.base['forgetting']:+.3f}" if self.base else "" for a in after]
        steps = mean((run["train_seconds"] - run["probe_seconds"]) / run["steps"] for run in runs)
        cells = [
            f"{name} (a seed failed)" if self.is_failed(name) else name,
            f"{runs[0]['trainable_parameters']:,}",
            f"{100 * runs[0]['trainable_share']:.2f}%",
            f"{runs[0]['learning_rate']:g}",
            ", ".join(f"{a['loss']:.4f}" for a in after),
            ", ".join(f"{a['exact_match']:.3f}" for a in after),
            ", ".join(forgot),
            f"{steps:.2f}",
            f"{mean(run['probe_seconds'] for run in runs):.0f}",
            f"{max(run['peak_memory_bytes'] for run in runs) / 2**30:.2f}",
        ]
        return row(cells)

    def plans(self) -> str:
        """Which methods chose the same numbers, with the first seed."""
        chosen: dict[str, list[str]] = {}
        for name in METHODS:
            run = load(self.folder / f"final-{name}-{SEEDS[0]}.json")
            if run:
                chosen.setdefault(run["plan_sha256"], []).append(name)
        same = [", ".join(names) for names in chosen.values() if len(names) > 1]
        if same:
            return f"Methods that chose exactly the same numbers (seed {SEEDS[0]}): {'; '.join(same)}."
        return f"No two of the {len(chosen)} methods run with seed {SEEDS[0]} chose the same numbers."

    def searches(self) -> list[str]:
        lines = head(("method", f"learning rate: loss after {SEARCH_STEPS} steps", "what was run"))
        for name, entry in METHODS.items():
            found, top = losses(self.folder, name), best(self.folder, name)
            cells = []
            for rate, value in found.items():
                failed = f"search-{name}-{rate}" in self.failed
                shown = f"{value:.4f}" if math.isfinite(value) else "failed" if failed else "diverged"
                cells.append(f"**{rate}: {shown}**" if rate == top else f"{rate}: {shown}")
            what = " ".join([f"`method={entry.method}`", *(f"`{word}`" for word in entry.settings)])
            lines.append(row([name, ", ".join(cells) or "not run", f"{what}; {entry.note}" if entry.note else what]))
        return lines

    def machine(self) -> str:
        """How the runs were made; more than one commit or number of threads is said."""
        runs = [json.loads(p.read_text()) for kind in ("search", "final") for p in self.folder.glob(f"{kind}-*.json")]
        if not runs:
            return ""
        commits = ", ".join(sorted({str(run["study"]["commit"]) for run in runs}))
        threads = ", ".join(sorted({str(run["study"]["threads"]) for run in runs}))
        cut = max(run["data"]["truncated_rows"] / run["data"]["rows"] for run in runs)
        hours = sum(run["study"]["wall_seconds"] for run in runs) / 3600
        devices = ", ".join(sorted({run["device"] for run in runs}))
        return (
            f"Threads a run: {threads}. Device: {devices}. Commits: {commits}. "
            f"Training rows cut at {MAX_LENGTH} tokens: {100 * cut:.2g} %. The runs so far took {hours:.1f} hours."
        )


def loss(run: dict[str, Any]) -> float:
    value = float(run["evaluation"]["after"]["loss"])
    return value if math.isfinite(value) else math.inf


def page(folder: Path) -> str:
    found = Found(folder)
    parts = [INTRO, found.progress(), "", found.machine(), ""]
    parts += ["## Budget of 1 %", "", *found.group(True), ""]
    parts += ["## Sizes of their own", "", "Each at its own settings; compare the share.", "", *found.group(False), ""]
    parts += [found.plans(), ""]
    parts += ["## Learning rates and settings", "", *found.searches(), ""]
    if found.failed:
        parts += ["## Failed runs", ""]
        parts += [f"- `{name}`: {re.sub(r'^thrifty: ', '', run['error'])}" for name, run in found.failed.items()]
        parts.append("")
    return "\n".join([*parts, END]) + "\n"


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    document = Path(sys.argv[2]) if len(sys.argv) > 2 else HERE.parents[1] / "docs" / "results" / "where.md"
    kept = document.read_text().partition(END)[2] if document.exists() else "\n"
    document.write_text(page(folder).rstrip("\n") + (kept or "\n"))
    print(f"wrote {document}")


if __name__ == "__main__":
    main()
