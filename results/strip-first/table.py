"""Print the tables of the strip-first study from the summaries beside this file."""

import json
import math
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).parent
METHODS = ("blocks", "strips", "strips_20", "strips_fine", "columns")


def loss(run: dict) -> float:
    return run["evaluation"]["after"]["loss"]


def error(values: list[float]) -> float:
    """Standard error of the mean over seeds."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def runs(start: str) -> dict[str, dict]:
    """What follows `start` in the name -> summary."""
    paths = sorted(HERE.glob(f"{start}-*.json"))
    return {path.stem.removeprefix(f"{start}-"): json.loads(path.read_text()) for path in paths}


def final() -> None:
    print("| method | trained | learning rate | input columns kept | loss by seed | mean | ± | minus blocks | ± | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    blocks = runs("final-blocks")
    for method in METHODS:
        found = runs(f"final-{method}")
        if not found:
            print(f"| {method} | not run | | | | | | | | |")
            continue
        losses, first = {seed: loss(run) for seed, run in found.items()}, next(iter(found.values()))
        apart = [value - loss(blocks[seed]) for seed, value in losses.items() if seed in blocks]
        kept = mean(run["kept_columns"][0] / run["kept_columns"][1] for run in found.values())
        print(
            f"| {method} | {first['trainable_parameters']:,} | {first['learning_rate']:g} | {100 * kept:.1f}% "
            f"| {', '.join(f'{value:.4f}' for value in losses.values())} "
            f"| {mean(losses.values()):.4f} | {error(list(losses.values())):.4f} "
            f"| {mean(apart) if apart else math.nan:+.4f} | {error(apart):.4f} "
            f"| {mean(run['train_seconds'] for run in found.values()):.0f} |"
        )


def search() -> None:
    print("| method | learning rate: loss on held-back training rows |\n|---|---|")
    for method in METHODS:
        losses = {rate: loss(run) for rate, run in runs(f"search-{method}").items()}
        if losses:
            print(f"| {method} | {', '.join(f'{rate}: {losses[rate]:.4f}' for rate in sorted(losses, key=float))} |")


if __name__ == "__main__":
    final()
    print()
    search()
