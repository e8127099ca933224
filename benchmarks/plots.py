"""How cost grows, as SVG files for the documentation: `python -m benchmarks plots` (needs matplotlib)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .rounds import ratio

__all__ = ["write_plots"]

_GIB = 2**30


def write_plots(records: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """One file per growth suite that was measured: step time over the floor's, and peak memory."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "thrifty"  # the same data give the same file
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for suite, label in (("share", "trained share, %"), ("block", "block side"), ("tokens", "tokens in a step")):
        if suite in records:
            written.append(_plot(_curves(records[suite]), label=label, path=folder / f"{suite}.svg"))
    return written


def _curves(record: Mapping[str, Any]) -> dict[str, list[tuple[float, float, float]]]:
    """By contender: x, ratio to the floor, peak GiB."""
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for group in record["groups"]:
        results = group["results"]
        for name in results:
            if name == "floor":
                continue
            tokens = re.search(r"(\d+) tokens", group["name"])
            here = tokens or re.search(r"([\d.]+)", name)
            if here is None:  # whole columns have no side
                continue
            curve = name if tokens else "SMT"
            middle, _, _ = ratio(results, name, "floor")
            curves.setdefault(curve, []).append((float(here[1]), middle, results[name]["peak_bytes"] / _GIB))
    return curves


def _plot(curves: Mapping[str, list[tuple[float, float, float]]], *, label: str, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, (time, memory) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, points in curves.items():
        x, ratios, peaks = zip(*sorted(points), strict=True)
        time.plot(x, ratios, marker="o", label=name)
        memory.plot(x, peaks, marker="o", label=name)
    time.axhline(1.0, color="gray", linewidth=1, linestyle="--")
    for axes, title in ((time, "step time over the floor"), (memory, "peak memory after load, GiB")):
        axes.set_xscale("log", base=2 if "share" not in label else 10)
        axes.set_xlabel(label)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
