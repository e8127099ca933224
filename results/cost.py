"""What each method of the studies costs until it is as good as LoRA at 1 %: steps from the curves of the final runs
(results/where, results/plateau), times the seconds of a step from `python -m benchmarks study`, which measures them in
turns. The table goes into docs/results/cost.md.

The runs' own seconds are not used: the machine had other work beside them.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from thrifty.study.curves import Curve, curve, mean_curve, seconds_to
from thrifty.study.statistics import mean, paired_bootstrap, score

HERE = Path(__file__).parent
PAGE, MARK, END = HERE.parent / "docs" / "results" / "cost.md", "<!-- cost -->", "<!-- end -->"
STUDIES = ("where", "plateau")
BASELINE = "lora 1%"


def finals() -> dict[str, dict[int, dict[str, Any]]]:
    """`method budget` -> seed -> what its record says of training."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for study in STUDIES:
        for path in sorted((HERE / study / "runs").glob("final-snips-*.json")):
            record = json.loads(path.read_text())
            if record["train_info"]["status"] == "success":
                info = record["run_info"]
                found.setdefault(f"{info['method']} {info['budget']}", {})[info["seed"]] = record["train_info"]
    return found


def seconds() -> dict[str, tuple[tuple[float, float, float], float]]:
    """`method budget` -> a step's seconds over the baseline's (median, quartiles), and its peak memory over it."""
    found = {}
    for group in json.loads((HERE / "performance" / "study.json").read_text())["groups"]:
        results = group["results"]
        for name in results:
            mine, base = results[name], results[BASELINE]
            ratios = [a / b for a, b in zip(mine["seconds"], base["seconds"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            found[name] = (middle, low, high), mine["peak_bytes"] / base["peak_bytes"]
    return found


def by_step(runs: list[dict[str, Any]]) -> Curve:
    """The mean curve, over steps in place of seconds."""
    mean_ = mean_curve([curve(run["metrics"]) for run in runs])
    return Curve(mean_.steps, tuple(map(float, mean_.steps)), mean_.losses)


def row(name: str, runs: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]], costs: dict[str, Any]) -> str:
    """One line of the table: over the seeds that both have."""
    seeds = sorted(runs.keys() & base.keys())
    mine, theirs = [runs[seed] for seed in seeds], [base[seed] for seed in seeds]
    words = [*name.split(" ", 1), str(len(seeds))]
    for measure, digits in (("exact_match", 3), ("loss", 3)):
        rows = [[run["measures"][measure]["rows"] for run in side] for side in (mine, theirs)]
        words.append(f"{mean([score(found) for found in rows[0]]):.{digits}f}")
        apart = paired_bootstrap(*rows)
        words.append("" if name == BASELINE else f"{apart.difference:+.3f} ({apart.low:+.3f} to {apart.high:+.3f})")
    target = by_step(theirs)
    reached, own = seconds_to(by_step(mine), min(target.losses)), seconds_to(target, min(target.losses))
    assert own is not None
    steps = None if reached is None else reached / own
    words.append("never" if steps is None else f"{steps:.2f}")
    same = name.replace("_half", "")  # half the rate: the same steps
    if same in costs:
        (middle, low, high), memory = costs[same]
        words += [
            f"{middle:.2f} ({low:.2f}-{high:.2f})",
            "never" if steps is None else f"{steps * middle:.2f}",
            f"{memory:.2f}",
        ]
    else:
        words += [""] * 3
    words.append(f"{mine[0]['file_size'] / 2**20:.0f} MiB")
    return "| " + " | ".join(words) + " |"


def table() -> str:
    """Markdown: all final runs of the studies, the baseline first."""
    runs, costs = finals(), seconds()
    head = [
        "method",
        "budget",
        "seeds",
        "exact match",
        "difference (95 %)",
        "loss",
        "difference (95 %)",
        "steps to LoRA's best",
        "a step's time (quartiles)",
        "time to LoRA's best",
        "peak memory",
        "result",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    names = [BASELINE, *sorted(runs.keys() - {BASELINE})]
    return "\n".join([*lines, *(row(name, runs[name], runs[BASELINE], costs) for name in names)])


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(MARK)
    PAGE.write_text(f"{before}{MARK}\n\n{table()}\n\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
