"""The largest batch, length and budget that fit into memory, and how many steps into hours or money."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass

from ..core.budget import Budget
from ..core.errors import ThriftyError
from .cost import Estimate, estimate_job
from .hardware import Hardware
from .job import Job
from .skeleton import build, weight_bytes

__all__ = ["Fit", "fewest_layers", "fit_job", "largest", "largest_batch", "parse_bytes", "steps_within"]

_LENGTH_STEP = 8  # tokens
_SHARES = 1000  # budgets are tried in steps of 0.1 % of the model
_MOST_ROWS, _MOST_TOKENS = 2**14, 2**20
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The largest of each that fits while the rest stays as configured; None where not even the least does, or, for the
    budget, where the method has none. `checkpoint_layers`: the fewest layers to compute again in backward."""

    memory_bytes: float
    rows: int | None
    length: int | None
    budget: Budget | None
    checkpoint_layers: int | None


def parse_bytes(text: str) -> float:
    """`24GB` (10^9), `24GiB` (2^30), `800 MB`; a bare number is in GB. ThriftyError otherwise."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([kmgt]i?)?(b?)\s*", text.lower())
    if found is None or float(found[1]) <= 0:
        raise ThriftyError(f"{text!r} is no size of memory: give 24GB, 24GiB or 800MB")
    unit = found[2] or ("" if found[3] else "g")
    return float(found[1]) * _UNITS[unit]


def largest(size: Callable[[int], float], limit: float, *, start: int, most: int) -> int | None:
    """The largest n from 1 to `most` with `size(n) <= limit`, for a size that never falls as n grows; None where there
    is none. Few calls where size is nearly linear: it is interpolated, and every third time halved."""
    low, low_size, slope = 0, 0.0, 0.0
    high, guess = most + 1, max(1, min(start, most))
    high_size, calls = float("inf"), 0
    while high - low > 1:
        found, calls = size(guess), calls + 1
        if found <= limit:
            slope = (found - low_size) / (guess - low) if low else 0.0
            low, low_size = guess, found
        else:
            high, high_size = guess, found
        if high_size == float("inf"):
            ahead = (limit - low_size) / slope + 1 if slope > 0 else guess
            guess = min(low + int(min(ahead, most)), most)
        elif calls % 3 == 0 or high_size <= low_size:
            guess = (low + high) // 2
        else:
            guess = low + int((limit - low_size) / (high_size - low_size) * (high - low))
        guess = min(max(guess, low + 1), max(high - 1, low + 1))
    return low or None


def largest_batch(job: Job, hardware: Hardware, memory_bytes: float, *, most: int = _MOST_ROWS) -> int | None:
    """Rows of a micro-batch, at most `most`."""
    return largest(
        lambda rows: estimate_job(dataclasses.replace(job, rows=rows), hardware).peak_bytes,
        memory_bytes,
        start=job.rows,
        most=most,
    )


def fewest_layers(job: Job, hardware: Hardware, memory_bytes: float) -> int | None:
    """How few of the lowest layers have to run again in backward, 0 for none; None where all are not enough."""
    depth = int(job.config.get_text_config().num_hidden_layers)

    def of_kept(layers: int) -> float:
        changed = dataclasses.replace(job, checkpointing=layers < depth, checkpoint_layers=depth - layers)
        return estimate_job(changed, hardware).peak_bytes

    kept = largest(of_kept, memory_bytes, start=depth, most=depth)
    if kept is not None:
        return depth - kept
    return depth if of_kept(0) <= memory_bytes else None


def fit_job(job: Job, hardware: Hardware, memory_bytes: float) -> Fit:
    """What fits into `memory_bytes`: rows of a micro-batch, tokens of a row (in steps of 8), the budget (in steps of
    0.1 % of the model, for methods that spend one), and how few layers have to run again in backward. Where the weights
    alone do not, no step is traced."""
    if weight_bytes(build(job), quantize=job.quantize) + 1e9 * hardware.framework_gb > memory_bytes:
        return Fit(memory_bytes=memory_bytes, rows=None, length=None, budget=None, checkpoint_layers=None)

    def of_length(units: int) -> float:
        changed = dataclasses.replace(job, length=_LENGTH_STEP * units, mean_length=None)
        return estimate_job(changed, hardware).peak_bytes

    def of_budget(share: int) -> float:
        changed = dataclasses.replace(job, budget=Budget(fraction=share / _SHARES))
        return estimate_job(changed, hardware).peak_bytes

    positions = getattr(job.config.get_text_config(), "max_position_embeddings", None) or _MOST_TOKENS
    most = max(1, min(positions, _MOST_TOKENS) // _LENGTH_STEP)
    units = largest(of_length, memory_bytes, start=job.length // _LENGTH_STEP, most=most)
    spends = any(part.select is not None and part.update.selector(part.select).spends for part in job.method.parts)
    share = largest(of_budget, memory_bytes, start=10, most=_SHARES) if spends else None
    return Fit(
        memory_bytes=memory_bytes,
        rows=largest_batch(job, hardware, memory_bytes),
        length=None if units is None else _LENGTH_STEP * units,
        budget=None if share is None else Budget(fraction=share / _SHARES),
        checkpoint_layers=fewest_layers(job, hardware, memory_bytes),
    )


def steps_within(estimate: Estimate, *, hours: float | None = None, cost: float | None = None) -> int:
    """How many steps, beside the probe, fit into `hours`, and into `cost` at the price of `estimate`."""
    seconds = float("inf") if hours is None else 3600 * hours
    if cost is not None:
        if not estimate.price:
            raise ThriftyError("--max-cost needs the price of an hour: --price 1.20")
        seconds = min(seconds, 3600 * cost / estimate.price)
    return max(0, int((seconds - estimate.probe_seconds) / estimate.step_seconds))
