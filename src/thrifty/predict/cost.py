"""What a job costs on a device: memory by part at its peak, seconds, tokens, money, energy."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..core.budget import distinct_parameters
from .grow import allocations, grow
from .hardware import Hardware
from .heap import Event, beyond
from .job import Job
from .ledger import Segment
from .placing import attach, probed
from .skeleton import build, layers_of, tensors_of, weight_bytes
from .trace import Trace, fused_dropout

__all__ = ["Estimate", "Traced", "estimate_job", "on", "state_bytes", "traced"]

# bytes of optimizer state for each byte of trained values (float32); AdamW's two moments where a name is not here
_STATE = {
    "sgd": 0.0,
    "adafactor": 0.01,
    "lion": 1.0,
    "muon": 1.0,
    "rmsprop": 1.0,
    "adagrad": 1.0,
    "galore": 0.5,
    "ademamix": 3.0,
}
# torchao's and bitsandbytes' states: a code for each number and a float32 scale for each 256; small leaves stay float32
_FEW_BITS = {"8bit": 8 / 32 + 1 / 256, "4bit": 4 / 32 + 1 / 256}
_FEWEST = 4096  # numbers
_STEP_PASSES = 7.0  # of AdamW over a trained number: value, gradient, two moments read; value, two moments written


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What does not depend on the device. Bytes; `step` of the widest batch, `mean` of the mean one."""

    job: Job
    parameters: int
    trained: int  # numbers
    weights: int  # bytes of the base model
    trained_bytes: int  # of the leaves
    beside: int  # leaves, original values and subspaces that lie beside the base's weights
    step: Trace
    mean: Trace
    probe: Trace | None
    # of steps, where the device has a heap: with all layers computed again, with none, and the share of each
    allocations: tuple[tuple[float, tuple[Event, ...]], ...] = ()
    states: tuple[int, ...] = ()  # bytes of each of the optimizer's tensors


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one run costs. Bytes and seconds; money where a price was given.

    memory: by part at the moment of the peak, `moment` says which; `peak_bytes` is their sum.
    step_seconds: of one optimizer step, by part in `seconds`.
    """

    method: str
    hardware: str
    parameters: int
    trained: int
    memory: Mapping[str, int]
    moment: str
    saved_bytes: int
    step_seconds: float
    seconds: Mapping[str, float]
    tokens_per_second: float
    probe_seconds: float
    total_seconds: float
    steps: int
    kwh: float
    price: float | None
    cost: float | None
    memory_bytes: float  # that the device has
    notes: tuple[str, ...] = field(default=())

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def beyond_weights_bytes(self) -> int:
        """The peak without the weights and what the process holds before them: what a run's summary calls its peak on a
        machine without an accelerator."""
        return self.peak_bytes - self.memory["weights"] - self.memory["framework"]

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.memory_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        return {**dataclasses.asdict(self), "peak_bytes": self.peak_bytes, "fits": self.fits}


def traced(job: Job, *, heap: bool = False, probe: bool = True) -> Traced:
    """Run a step of `job` without values. Seconds, whatever the model's size. `heap`: whether it is for a device with
    one, a processor; `probe`: whether what the method looks at first is run too. ThriftyError as a run would give it.
    """
    model = build(job)
    parameters, weights = distinct_parameters(model), weight_bytes(model)
    packed = weight_bytes(model, quantize=job.quantize)
    bare = build(job) if probe and job.method.needs_probe else None
    model_, _ = attach(model, job.method, job.budget)
    leaves = [p for p in model_.parameters() if p.requires_grad]
    with nullcontext() if heap else fused_dropout():
        step = grow(job, model_)
        mean = step
        if job.mean_length is not None and round(job.mean_length) != job.length:
            mean = grow(dataclasses.replace(job, length=max(1, round(job.mean_length))), model_)
    return Traced(
        job=job,
        parameters=parameters,
        trained=sum(p.numel() for p in leaves),
        weights=packed,
        trained_bytes=sum(p.nbytes for p in leaves),
        beside=weight_bytes(model_) - weights + _held_by_parts(model_),
        step=step,
        mean=mean,
        probe=None if bare is None else _probe(job, bare),
        allocations=_allocations(job, model_) if heap else (),
        states=tuple(size for p in leaves for size in (state_bytes(job, p.nbytes) // 2,) * 2),
    )


def _allocations(job: Job, model: nn.Module) -> tuple[tuple[float, tuple[Event, ...]], ...]:
    """The heap is simulated with all layers alike."""
    if not job.checkpointing or job.checkpoint_layers is None:
        return ((1.0, tuple(allocations(job, model))),)
    parent, name = layers_of(model)
    again = min(1.0, job.checkpoint_layers / len(getattr(parent, name)))
    jobs = {
        True: dataclasses.replace(job, checkpoint_layers=None),
        False: dataclasses.replace(job, checkpointing=False),
    }
    shares = {True: again, False: 1.0 - again}
    return tuple((shares[of], tuple(allocations(one, model))) for of, one in jobs.items() if shares[of] > 0)


def _probe(job: Job, model: nn.Module) -> Trace:
    """One unit of what the method looks at before training."""
    names = probed(model, job.method, job.budget)
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    return grow(job, model, probe=True)


def _held_by_parts(model: nn.Module) -> int:
    parts = {id(part): part for m in model.modules() for part in getattr(m, "_thrifty", {}).values()}
    return sum(held.nbytes for part in parts.values() for held in tensors_of(part).values())


def estimate_job(job: Job, hardware: Hardware, *, price: float | None = None, watts: float | None = None) -> Estimate:
    """What `job` costs on `hardware`; `price` of an hour, `watts` in place of the profile's."""
    return on(traced(job, heap=hardware.heap > 0), hardware, price=price, watts=watts)


def on(found: Traced, hardware: Hardware, *, price: float | None = None, watts: float | None = None) -> Estimate:
    """The same for a job that was traced."""
    job = found.job
    memory, moment = _memory(found, hardware)
    seconds = {name: job.accumulation * value for name, value in hardware.seconds(found.mean.work).items()}
    seconds["optimizer"] = hardware.seconds({"bytes": _STEP_PASSES * found.trained_bytes})["memory"]
    step = sum(seconds.values())
    probe = 0.0
    if found.probe is not None:
        share = (job.mean_length or job.length) / job.length
        probe = job.probe_units * share * sum(hardware.seconds(found.probe.work).values())
    total = probe + job.steps * step
    kwh = total / 3600 * (hardware.watts if watts is None else watts) / 1000
    return Estimate(
        method=job.method.name,
        hardware=hardware.name,
        parameters=found.parameters,
        trained=found.trained,
        memory=memory,
        moment=moment,
        saved_bytes=found.step.saved,
        step_seconds=step,
        seconds=seconds,
        tokens_per_second=job.tokens / step,
        probe_seconds=probe,
        total_seconds=total,
        steps=job.steps,
        kwh=kwh,
        price=price,
        cost=None if price is None else price * total / 3600,
        memory_bytes=hardware.memory_bytes,
        notes=job.notes,
    )


def state_bytes(job: Job, trained_bytes: int) -> int:
    """What the optimizer named `job.optimizer` keeps for a leaf of `trained_bytes`."""
    factor = next((share for name, share in _STATE.items() if name in job.optimizer), 2.0)
    if trained_bytes >= 4 * _FEWEST:
        factor *= next((share for name, share in _FEW_BITS.items() if name in job.optimizer), 1.0)
    return round(factor * trained_bytes)


def _memory(found: Traced, hardware: Hardware) -> tuple[dict[str, int], str]:
    """By part, at the moment when most is held; and that moment in words."""
    job = found.job
    held = {
        "weights": found.weights,
        "trained values": found.beside,
        "optimizer": sum(found.states),
        "framework": round(1e9 * hardware.framework_gb),
    }
    resident = round(
        sum(share * beyond(events, found.states, settled=hardware.heap) for share, events in found.allocations)
    )
    moments: list[tuple[int, str, dict[str, int]]] = []
    for segment, kinds in found.step.peaks.items():
        parts = _parts(kinds, gradients=found.step.gradient_bytes if job.accumulation > 1 else None)
        moments.append(_moment(_words(segment), {**held, **parts}, hardware, resident=resident))
    gradients = {"gradients": found.step.gradient_bytes}
    moments.append(_moment("the optimizer's step", {**held, **gradients}, hardware))
    if found.probe is not None:
        bare = {**held, "trained values": 0, "optimizer": 0}
        kinds = max(found.probe.peaks.values(), key=lambda one: sum(one.values()))
        moments.append(_moment("the probe", {**bare, "probe": sum(kinds.values())}, hardware))
    _, words, parts = max(moments, key=lambda moment: moment[0])
    return parts, words


def _parts(kinds: Counter[str], *, gradients: int | None) -> dict[str, int]:
    return {
        "gradients": kinds["gradients"] if gradients is None else max(gradients, kinds["gradients"]),
        "activations": kinds["activations"],
        "head": kinds["head"],
        "working": kinds["working"],
    }


def _moment(
    words: str, parts: dict[str, int], hardware: Hardware, *, resident: int = 0
) -> tuple[int, str, dict[str, int]]:
    moving = sum(parts.get(name, 0) for name in ("activations", "head", "working", "probe"))
    every = dict.fromkeys(("gradients", "activations", "head", "working", "probe"), 0) | parts
    every["allocator"] = resident if resident else round(hardware.slack * moving)
    return sum(every.values()), words, every


def _words(segment: Segment) -> str:
    name, number = segment
    return {
        "start": "the embeddings",
        "forward": f"forward of layer {number}",
        "loss": "the loss",
        "head": "backward of the loss",
        "backward": f"backward of layer {number}",
    }[name]
