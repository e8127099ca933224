"""The machine: memory, disk, and whether the output folder is free."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from thrifty.core.budget import distinct_parameters
from thrifty.core.errors import ThriftyError
from thrifty.core.memory import free_memory
from thrifty.data.encode import Encoded
from thrifty.predict.cost import estimate_job
from thrifty.predict.hardware import find_hardware
from thrifty.predict.skeleton import weight_bytes

from ..arguments import keeps_best
from ..checkpoint import claim, find_checkpoint
from ..config import RunConfig
from ..display import human_bytes
from ..estimate import job_of
from ..objectives import parse_objective
from ..resumed import refuse_changes
from .report import Report

__all__ = ["check_disk", "check_memory", "check_output"]

_STATE = 16  # bytes for each trained number: its value, gradient and AdamW's two moments, float32
_SAVED = 12  # of these, what a checkpoint keeps


def check_memory(
    report: Report, config: RunConfig, model: PreTrainedModel, *, trained: int, device: str, rows: Sequence[Encoded]
) -> None:
    """The estimate against the memory there is: a problem where weights and what is trained do not fit, a warning where
    the estimated peak, of `rows` as they will be trained, does not."""
    weights = distinct_parameters(model) * next(model.parameters()).element_size()
    if config.quantize is not None:
        with report.attempt():
            weights = weight_bytes(model, quantize=config.quantize)
    certain, free = weights + _STATE * trained, free_memory(device)
    parts = f"weights {human_bytes(weights)}, trained values with their state {human_bytes(_STATE * trained)}"
    if certain > free:
        half = " dtype=bfloat16 halves the weights," if config.dtype == "float32" else ""
        report.problem(
            f"memory: {parts} do not fit into the {human_bytes(free)} that are free on {device}:{half} "
            "take a smaller budget or model, or a larger machine"
        )
        return
    tokens = max(1, sum(len(row.input_ids) for row in rows))
    read = [len(row.input_ids) for row in rows], sum(row.trained for row in rows) / tokens
    try:
        found = estimate_job(job_of(config, read=read), find_hardware("cpu" if device == "cpu" else None))
    except ThriftyError as error:  # an objective or a plan whose steps are not modelled
        report.say(f"memory: {parts}, and activations ({error}); {human_bytes(free)} free on {device}")
        return
    at = f"about {human_bytes(found.peak_bytes)} at its peak ({found.moment})"
    report.say(f"memory: {parts}; {at}, {human_bytes(free)} free on {device}")
    if found.peak_bytes > free:
        report.warn(
            f"memory: the run is estimated to need {at}, and {human_bytes(free)} are free on {device}: lower "
            "per_device_train_batch_size or max_length, or set gradient_checkpointing=true; --step measures it"
        )


def check_disk(report: Report, config: RunConfig, model: PreTrainedModel, *, trained: int) -> None:
    """Room for the checkpoints that a run keeps, one more while it is written, and the delta."""
    saves = config.training.get("save_strategy", "steps") != "no" and not parse_objective(config.objective).uses_trl
    kept = (config.training.get("save_total_limit") or 2) + keeps_best(config) + 1 if saves else 0
    checkpoints = kept * _SAVED * trained
    delta = 2 * trained * next(model.parameters()).element_size()
    place = _existing(Path(config.output_dir))
    free = shutil.disk_usage(place).free
    text = f"about {human_bytes(checkpoints)} for up to {kept} checkpoints and " if kept else "about "
    text += f"{human_bytes(delta)} for the delta"
    report.say(f"disk: {text}; {human_bytes(free)} free in {place}")
    if checkpoints + delta > free:
        report.problem(
            f"output_dir: {text} do not fit into the {human_bytes(free)} that are free in {place}: free space, give "
            "another output_dir, or lower save_total_limit or budget"
        )


def check_output(report: Report, config: RunConfig) -> None:
    """Whether the run may begin, or go on, in `output_dir`."""
    output = Path(config.output_dir)
    place = _existing(output)
    if not place.is_dir():
        report.problem(f"output_dir: {str(place)!r} is a file: give the name of a folder")
    elif not os.access(place, os.W_OK):
        report.problem(f"output_dir: no permission to write in {str(place)!r}: give another output_dir")
    with report.attempt():
        checkpoint = find_checkpoint(config.resume_from_checkpoint, output_dir=output)
        claim(output, resume=checkpoint)
        if checkpoint is None:
            report.say(f"output_dir: {output} is free")
            return
        report.say(f"goes on from {checkpoint.folder}")
        processes = checkpoint.record().get("processes", 1)
        refuse_changes(checkpoint, config=config.to_dict(), processes=processes)


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return next((place for place in (path, *path.resolve().parents) if place.exists()), Path.cwd())
