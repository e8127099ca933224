"""Print the tables of docs/results/first-run.md from the summaries beside this file."""

import json
import math
from pathlib import Path

HERE = Path(__file__).parent
METHODS = ("full", "lora", "dora", "smt", "smt_per_matrix", "random_blocks")


def load(pattern: str) -> dict[str, dict]:
    return {
        path.stem: json.loads(path.read_text()) for path in sorted(HERE.glob(pattern)) if "metrics" not in path.name
    }


def search() -> None:
    print("| method | learning rate: loss after 25 steps on held-back training rows |\n|---|---|")
    runs = load("search-*.json")
    for method in METHODS:
        start = f"search-{method}-"
        mine = {name.removeprefix(start): run for name, run in runs.items() if name.startswith(start)}
        losses = {rate: run["evaluation"]["after"]["loss"] for rate, run in mine.items()}
        if losses:
            best = min(losses, key=lambda rate: losses[rate])
            cells = [f"{'**' * (r == best)}{r}: {losses[r]:.4f}{'**' * (r == best)}" for r in sorted(losses, key=float)]
            print(f"| {method} | {', '.join(cells)} |")


def final() -> None:
    runs = load("final-*.json")
    print("| method | trained | share | learning rate | loss | exact match | ± | tokens/s | peak memory, GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    before = next((r["evaluation"]["before"] for r in runs.values() if r["evaluation"]["before"]), None)
    if before:
        print(f"| before training | 0 | | | {before['loss']:.4f} | {before['exact_match']:.3f} | | | |")
    for method in METHODS:
        run = runs.get(f"final-{method}")
        if run is None:
            print(f"| {method} | not run | | | | | | | |")
            continue
        after, match = run["evaluation"]["after"], run["evaluation"]["after"]["exact_match"]
        error = math.sqrt(match * (1 - match) / 200)
        print(
            f"| {method} | {run['trainable_parameters']:,} | {100 * run['trainable_share']:.2f}% "
            f"| {run['learning_rate']:g} "
            f"| {after['loss']:.4f} | {match:.3f} | {error:.3f} | {run['tokens_per_second']:.0f} "
            f"| {run['peak_memory_bytes'] / 2**30:.2f} |"
        )


if __name__ == "__main__":
    final()
    print()
    search()
