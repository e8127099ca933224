"""Estimates as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .cost import Estimate
from .fit import Fit

__all__ = ["describe", "duration", "fit_text", "gigabytes", "table"]


def gigabytes(size: float) -> str:
    """Bytes as `3.41 GB` (10^9), small ones as MB."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """`0.42 s`, `53 min`, `7.5 h`."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def describe(estimate: Estimate) -> str:
    """One estimate, part by part."""
    e = estimate
    room = "fits into" if e.fits else "does NOT fit into"
    share = 100 * e.trained / e.parameters
    lines = [
        f"{e.method} on {e.hardware}: {e.trained:,} of {e.parameters:,} numbers trained ({share:.3g}%)",
        f"memory: {gigabytes(e.peak_bytes)} at the peak, {e.moment}; {room} {gigabytes(e.memory_bytes)}",
    ]
    for part, size in sorted(e.memory.items(), key=lambda item: -item[1]):
        if size:
            lines.append(f"  {part:16} {gigabytes(size):>12}")
    times = ", ".join(f"{part} {duration(s)}" for part, s in e.seconds.items() if s > 0.01 * e.step_seconds)
    lines.append(f"step:   {duration(e.step_seconds)} ({times}); {e.tokens_per_second:,.0f} tokens/s")
    probe = f" and the probe's {duration(e.probe_seconds)}" if e.probe_seconds else ""
    money = "" if e.cost is None else f", cost {e.cost:,.2f} at {e.price:g} an hour"
    lines.append(f"run:    {duration(e.total_seconds)} for {e.steps:,} steps{probe}; {e.kwh:.3g} kWh{money}")
    return "\n".join([*lines, *(f"note:   {note}" for note in e.notes)])


def table(estimates: Mapping[str, Estimate | str]) -> str:
    """One line a method; where it is a text, why there is no estimate."""
    head = ["method", "trained", "peak", "fits", "step", "tokens/s", "run", "kWh", "cost"]
    rows = [head]
    for name, e in estimates.items():
        if isinstance(e, str):
            rows.append([name, f"none: {e}"])
            continue
        cost = "" if e.cost is None else f"{e.cost:,.2f}"
        rows.append(
            [
                name,
                f"{e.trained:,}",
                gigabytes(e.peak_bytes),
                "yes" if e.fits else "no",
                duration(e.step_seconds),
                f"{e.tokens_per_second:,.0f}",
                duration(e.total_seconds),
                f"{e.kwh:.3g}",
                cost,
            ]
        )
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    whole = [row for row in rows if len(row) > 2]
    widths = [max(len(row[i]) for row in whole) for i in range(len(whole[0]))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells).rstrip() if len(row) > 2 else f"{row[0].ljust(widths[0])}  {row[1]}")
    return "\n".join(lines)


def fit_text(fit: Fit, *, spends: bool) -> str:
    """What fits, in one line."""
    rows = "not even one row" if fit.rows is None else f"per_device_train_batch_size={fit.rows}"
    length = "no length" if fit.length is None else f"max_length={fit.length}"
    budget = "no budget" if fit.budget is None else f"budget={fit.budget}"
    again = "no checkpoint_layers" if fit.checkpoint_layers is None else f"checkpoint_layers={fit.checkpoint_layers}"
    parts = [rows, length, *([budget] if spends else []), again]
    return f"fits into {gigabytes(fit.memory_bytes)}, each with the rest as configured: {', '.join(parts)}"
