"""`thrifty estimate`: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
from typing import Any

from thrifty.core.errors import ThriftyError

__all__ = ["add_estimate_options", "run_estimate"]


def add_estimate_options(sub: argparse.ArgumentParser) -> None:
    """The options beside the run file and its settings."""
    sub.add_argument("--compare", action="store_true", help="other methods at the same budget too, as one table")
    sub.add_argument("--fit", metavar="MEMORY", help="the largest batch, length and budget that fit: 24GB")
    sub.add_argument("--max-hours", type=float, metavar="HOURS", help="how many steps fit into this time")
    sub.add_argument("--max-cost", type=float, metavar="MONEY", help="how many steps fit into this money, with --price")
    sub.add_argument("--hardware", metavar="NAME", help="a profile: h100, a100-80gb, l4, cpu, ..., or a YAML file")
    sub.add_argument("--price", type=float, metavar="MONEY", help="of one hour")
    sub.add_argument("--watts", type=float, help="drawn while it trains (the profile's unless given)")
    sub.add_argument("--measure", action="store_true", help="calibrate this machine first (under 30 s), and keep it")
    sub.add_argument("--json", action="store_true", help="print JSON")


def run_estimate(arguments: argparse.Namespace, file: str | None, settings: list[str]) -> int:
    """Print the estimate; exit code 0."""
    for name in ("max_hours", "max_cost", "price", "watts"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            raise ThriftyError(f"--{name.replace('_', '-')} must be above 0, not {value:g}")
    if arguments.measure:
        _measure()
        if file is None and not settings:
            return 0
    from thrifty.predict.cost import estimate_job
    from thrifty.predict.fit import fit_job, parse_bytes, steps_within
    from thrifty.predict.hardware import find_hardware
    from thrifty.predict.table import describe, fit_text, table
    from thrifty.run.config import load_config
    from thrifty.run.estimate import compare_job, job_of

    memory = None if arguments.fit is None else parse_bytes(arguments.fit)
    hardware = find_hardware("measured" if arguments.measure and arguments.hardware is None else arguments.hardware)
    prices = {"price": arguments.price, "watts": arguments.watts}
    job = job_of(load_config(file, settings, needs_training_data=False))
    found: dict[str, Any] = {}
    if arguments.compare:
        found = compare_job(job, hardware, **prices)
        first = next(iter(found.values()))
    else:
        first = estimate_job(job, hardware, **prices)
    fit = None if memory is None else fit_job(job, hardware, memory)
    within = None
    if arguments.max_hours is not None or arguments.max_cost is not None:
        within = steps_within(first, hours=arguments.max_hours, cost=arguments.max_cost)
    if arguments.json:
        _print_json(first, found, fit, within)
        return 0
    print(describe(first))
    if found:
        print()
        print(table(found))
    if fit is not None:
        print(fit_text(fit, spends=fit.budget is not None))
    if within is not None:
        rows = job.rows * job.accumulation
        print(f"within these limits: max_steps={within} ({within * rows:,} rows)")
    return 0


def _measure() -> None:
    from thrifty.predict.hardware import save_hardware
    from thrifty.predict.measure import measure

    profile = measure()
    path = save_hardware(profile)
    rates = ", ".join(f"{dtype} {rate:.3g} TFLOP/s" for dtype, rate in profile.tflops.items() if dtype != "float16")
    print(f"{profile.source}: {rates}, memory {profile.bandwidth_gbs:.3g} GB/s; kept in {path}")


def _print_json(first: Any, found: dict[str, Any], fit: Any, within: int | None) -> None:
    answer: dict[str, Any] = first.to_dict()
    if found:
        answer["compare"] = {name: e if isinstance(e, str) else e.to_dict() for name, e in found.items()}
    if fit is not None:
        budget = None if fit.budget is None else fit.budget.fraction
        answer["fit"] = {"memory_bytes": fit.memory_bytes, "rows": fit.rows, "length": fit.length, "budget": budget}
        answer["fit"]["checkpoint_layers"] = fit.checkpoint_layers
    if within is not None:
        answer["max_steps"] = within
    print(json.dumps(answer, indent=2))
