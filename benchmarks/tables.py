"""Results as Markdown tables, and against the targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from .rounds import ratio
from .suites import EQUAL_LORA

__all__ = ["group_table", "target_table"]

Results = Mapping[str, Any]
_MIB = 2**20


def _mib(record: Results, key: str) -> str:
    return f"{record[key] / _MIB:,.0f}" if key in record else ""


def group_table(group: Mapping[str, Any]) -> str:
    """Seconds, ratio to the group's first contender (median and quartiles of the rounds' ratios), and MiB."""
    results = group["results"]
    first = next(iter(results))
    rounds = len(results[first]["seconds"])
    lines = [
        f"{group['name']} ({rounds} rounds)",
        "",
        f"| | trained | s | over {first} | quartiles | peak MiB | kept for backward | by tuned layers "
        "| gradients | optimizer |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, record in results.items():
        middle, low, high = ratio(results, name, first)
        trained = f"{record['trained']:,}" if "trained" in record else ""
        sizes = (_mib(record, key) for key in _BYTES)
        times = f"{statistics.median(record['seconds']):.2f} | {middle:.3f} | {low:.3f}-{high:.3f}"
        lines.append(f"| {name} | {trained} | {times} | {' | '.join(sizes)} |")
    return "\n".join(lines) + "\n"


_BYTES = ("peak_bytes", "saved_bytes", "saved_by_tuned_bytes", "gradient_bytes", "optimizer_bytes")


def _find(records: Mapping[str, Results], suite: str, group: int) -> Results | None:
    return records[suite]["groups"][group]["results"] if suite in records else None


def _overhead_share(results: Results, smt: str, lora: str) -> tuple[float, float, float]:
    """Median and quartiles over the rounds of (SMT - floor) / (LoRA - floor)."""
    rounds = zip(*(results[name]["seconds"] for name in ("floor", smt, lora)), strict=True)
    shares = sorted((s - f) / (lo - f) for f, s, lo in rounds if lo != f)
    low, middle, high = statistics.quantiles(shares, n=4, method="inclusive")
    return middle, low, high


def _bytes_ratio(results: Results, one: str, other: str, key: str) -> tuple[float, float, float]:
    value = results[one][key] / results[other][key]
    return value, value, value


def _over(results: Results, key: str) -> tuple[float, float, float]:
    base = results["inference"][key]
    value = (results["probe"][key] - base) / (results["full"][key] - base)
    return value, value, value


def _against_trl(results: Results) -> tuple[float, float, float]:
    """The better of TRL's two counts."""
    ours = "thrifty, SMT 1 %"
    return min(ratio(results, name, ours) for name in results if name.startswith("TRL"))


_SMT, _TRL = "thrifty, SMT 1 %", "TRL, PEFT LoRA r16"
_LORA = "thrifty, PEFT LoRA r16"
# what, suite, group, figure, bound, whether it is a ceiling
_TARGETS: list[tuple[str, str, int, Callable[[Results], tuple[float, float, float]], float, bool]] = [
    ("step, SMT 1 % over the floor", "steps", 0, lambda r: ratio(r, "SMT 1 %, 64", "floor"), 1.03, True),
    ("step, SMT 5 % over the floor", "steps", 0, lambda r: ratio(r, "SMT 5 %, 64", "floor"), 1.06, True),
    (
        "overhead, SMT 5 % as a share of LoRA's at equal count",
        "steps",
        0,
        lambda r: _overhead_share(r, "SMT 5 %, 64", EQUAL_LORA),
        0.5,
        True,
    ),
    ("step, DoRA over SMT 5 %", "steps", 0, lambda r: ratio(r, "DoRA r16", "SMT 5 %, 64"), 1.4, False),
    ("step, SHiRA over SMT 5 %", "steps", 0, lambda r: ratio(r, "SHiRA r16", "SMT 5 %, 64"), 1.3, False),
    ("step, full over SMT 5 %", "steps", 0, lambda r: ratio(r, "full", "SMT 5 %, 64"), 1.45, False),
    (
        "kept for backward by tuned layers, strip-first over LoRA r16",
        "kept",
        0,
        lambda r: _bytes_ratio(r, "strip-first", "LoRA r16", "saved_by_tuned_bytes"),
        0.35,
        True,
    ),
    (
        "peak memory, SMT 1 % here over LoRA r16 in TRL's SFTTrainer",
        "snips",
        0,
        lambda r: _bytes_ratio(r, _SMT, _TRL, "peak_bytes"),
        0.5,
        True,
    ),
    (
        "the same, checkpointing on both sides",
        "memory",
        0,
        lambda r: _bytes_ratio(r, _SMT, _TRL, "peak_bytes"),
        0.5,
        True,
    ),
    (
        "peak memory, SMT 1 % over LoRA r16, both here, checkpointing",
        "memory",
        0,
        lambda r: _bytes_ratio(r, _SMT, _LORA, "peak_bytes"),
        0.8,
        True,
    ),
    (
        "peak memory, SMT 1 % over LoRA r16, both here",
        "snips",
        0,
        lambda r: _bytes_ratio(r, _SMT, _LORA, "peak_bytes"),
        0.8,
        True,
    ),
    ("examples/s over TRL, snips", "snips", 0, _against_trl, 2.0, False),
    ("examples/s over TRL, gsm8k", "gsm8k", 1, _against_trl, 1.5, False),
    ("examples/s over TRL with checkpointing, gsm8k", "gsm8k", 2, _against_trl, 1.5, False),
    ("examples/s over LoRA here, snips", "snips", 0, lambda r: ratio(r, _LORA, _SMT), 1.15, False),
    ("examples/s over LoRA here, gsm8k", "gsm8k", 0, lambda r: ratio(r, _LORA, _SMT), 1.15, False),
    ("probe over full steps, time", "probe", 0, lambda r: ratio(r, "probe", "full"), 1.2, True),
    ("probe over full steps, memory above inference", "probe", 0, lambda r: _over(r, "peak_bytes"), 0.35, True),
]


def target_table(records: Mapping[str, Results]) -> str:
    """Every target that the records can answer."""
    lines = ["| measured | target | median | quartiles | |", "|---|---|---|---|---|"]
    for what, suite, group, figure, bound, ceiling in _TARGETS:
        results = _find(records, suite, group)
        if results is None or any("failed" in record for record in results.values()):
            continue
        middle, low, high = figure(results)
        met = middle <= bound if ceiling else middle >= bound
        spread = f"{low:.3f}-{high:.3f}" if low != high else ""
        sign = "≤" if ceiling else "≥"
        lines.append(f"| {what} | {sign} {bound} | {middle:.3f} | {spread} | {'met' if met else 'missed'} |")
    return "\n".join(lines) + "\n"
