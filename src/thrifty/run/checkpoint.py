"""Checkpoints: the trained values and all that a resumed run needs to end bit-identical, in safetensors and JSON.

checkpoint-120/
    values.safetensors              the trained leaves (float32: 4 bytes per trained number)
    optimizer.{json,safetensors}    AdamW: 8 bytes per trained number
    plan.json, plan.safetensors     what is trained
    schedule.{json,safetensors}     of a method whose plan changes: its step, what it keeps, what it trained before
    scheduler.json, random.{json,safetensors}, trainer_state.json
    record.json                     the run: configuration, processes, fingerprints, clock, evaluation before training
    complete.json                   written last: the size of every file above
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainingArguments

from thrifty.core.errors import ThriftyError
from thrifty.core.files import disk_errors, is_whole, new_folder, remove_folder
from thrifty.core.plan import Plan, plan_from_files, plan_to_files

from .state import load_state, save_state

__all__ = [
    "Checkpoint",
    "checkpoints",
    "claim",
    "find_checkpoint",
    "refuse_changes",
    "remove_later",
    "remove_old",
    "warn_of_processes",
    "write_checkpoint",
]

MARKER = "complete.json"
_log = logging.getLogger("thrifty")
_NAME = re.compile(r"checkpoint-(\d+)")

# What a resumed run may set anew: it changes how long the run goes on and what is reported, not the steps themselves.
_FREE = frozenset(
    {
        "output_dir",
        "resume_from_checkpoint",
        "overwrite_output_dir",
        "max_steps",
        "num_train_epochs",
        "early_stopping_patience",
        "load_best_model_at_end",
        "report_to",
        "run_name",
        "project",
        "logging_steps",
        "logging_strategy",
        "logging_first_step",
        "eval_steps",
        "eval_strategy",
        "eval_delay",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "per_device_eval_batch_size",
        "log_level",
        "log_level_replica",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "dataloader_persistent_workers",
        "eval",
    }
)
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder."""

    folder: Path

    @property
    def step(self) -> int:
        found = _NAME.fullmatch(self.folder.name)
        assert found is not None
        return int(found[1])

    def values(self) -> dict[str, Tensor]:
        """The float32 leaves by name."""
        return {name: tensor.clone() for name, tensor in load_file(self.folder / "values.safetensors").items()}

    def plan(self) -> Plan:
        file = self.folder / "plan.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()} if file.exists() else {}
        return plan_from_files(self._json("plan.json"), tensors)

    def record(self) -> dict[str, Any]:
        return self._json("record.json")

    def state(self, name: str) -> Any:
        """`optimizer`, `scheduler`, `random` or `schedule`."""
        return load_state(self.folder / name)

    def _json(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


def write_checkpoint(
    folder: Path,
    *,
    values: Mapping[str, Tensor],
    plan: Plan,
    states: Mapping[str, Any],
    trainer_state: str,
    record: Mapping[str, Any],
) -> None:
    """Write a complete checkpoint or nothing. ThriftyError on a full disk; what was there before stays."""
    earlier = [c.folder.name for c in checkpoints(folder.parent) if c.folder != folder]
    kept = f"{earlier[-1]} is whole: free space and go on with resume_from_checkpoint=auto" if earlier else "free space"
    with disk_errors(str(folder), fix=kept), new_folder(folder, marker=MARKER) as partial:
        save_file(_on_cpu(values), partial / "values.safetensors")
        plan_record, index = plan_to_files(plan)
        (partial / "plan.json").write_text(json.dumps(plan_record), encoding="utf-8")
        if index:
            save_file(_on_cpu(index), partial / "plan.safetensors")
        for name, state in states.items():
            save_state(partial / name, state)
        (partial / "trainer_state.json").write_text(trainer_state, encoding="utf-8")
        (partial / "record.json").write_text(json.dumps(record), encoding="utf-8")


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def checkpoints(output_dir: Path) -> list[Checkpoint]:
    """The complete checkpoints in `output_dir`, the oldest first; half-written ones are passed over."""
    found = [Checkpoint(folder) for folder in output_dir.glob("checkpoint-*") if _NAME.fullmatch(folder.name)]
    return sorted((c for c in found if is_whole(c.folder, marker=MARKER)), key=lambda c: c.step)


def remove_old(output_dir: Path, *, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    found = checkpoints(output_dir)
    for checkpoint in found[: max(0, len(found) - keep)]:
        if checkpoint.step != best_step:
            remove_folder(checkpoint.folder)


def remove_later(output_dir: Path, *, step: int) -> None:
    """Remove the checkpoints after `step`: the run goes on from there, and they belong to what it leaves behind."""
    for checkpoint in checkpoints(output_dir):
        if checkpoint.step > step:
            remove_folder(checkpoint.folder)


def claim(output_dir: Path, *, resume: Checkpoint | None) -> None:
    """ThriftyError where `output_dir` holds a run that is not the one to resume."""
    if resume is not None and resume.folder.parent.resolve() == output_dir.resolve():
        return
    found = checkpoints(output_dir)
    if (output_dir / "summary.json").exists():
        what, fix = "a finished run", "resume_from_checkpoint=auto with more max_steps to train it further"
    elif found:
        what, fix = f"a run stopped after step {found[-1].step}", "resume_from_checkpoint=auto to go on with it"
    else:
        return
    raise ThriftyError(
        f"output_dir: {str(output_dir)!r} holds {what}; give another one, or {fix}, or remove the folder"
    )


def find_checkpoint(resume: str | bool | None, *, output_dir: Path) -> Checkpoint | None:
    """What `resume_from_checkpoint` asks for: `auto` (the newest, or none), true (the newest), a folder, or nothing."""
    if resume is None or resume is False:
        return None
    if resume is True or resume == "auto":
        found = checkpoints(output_dir)
        if not found and resume is True:
            raise ThriftyError(
                f"resume_from_checkpoint: {str(output_dir)!r} holds no complete checkpoint; 'auto' starts anew then"
            )
        return found[-1] if found else None
    folder = Path(resume)
    if not _NAME.fullmatch(folder.name) or not is_whole(folder, marker=MARKER):
        around = folder if any(folder.glob("checkpoint-*")) else folder.parent
        names = ", ".join(str(c.folder) for c in checkpoints(around)) or "none"
        raise ThriftyError(
            f"resume_from_checkpoint: {resume!r} is no complete checkpoint (complete ones there: {names})"
        )
    return Checkpoint(folder)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def refuse_changes(
    checkpoint: Checkpoint, *, config: Mapping[str, Any], fingerprints: Mapping[str, str], processes: int
) -> None:
    """ThriftyError naming the first key that changed since `checkpoint` and would make the resumed run another one.

    `processes`: how many train now. Another number is one of these changes where the rows of a step change with it."""
    record = checkpoint.record()
    worked = record.get("processes", processes)
    stock = {item.name: item.default for item in dataclasses.fields(TrainingArguments)}
    saved, current = dict(_flat(record["config"])), dict(_flat(config))
    batches = [[side.pop(key, stock[key]) for key in _BATCH] for side in (saved, current)]
    start_over = "set it back, or give another output_dir to start anew"
    counts = [(*batches[0], worked), (*batches[1], processes)]
    if math.prod(counts[0]) != math.prod(counts[1]):
        was, now = (" * ".join(map(str, of)) for of in counts)
        raise ThriftyError(
            f"{' * '.join(_BATCH)} * processes was {was} in {checkpoint.folder} and is {now}: "
            f"the rows of a step would change; {start_over}"
        )
    for key in [*saved, *(key for key in current if key not in saved)]:
        before, now = (side.get(key, stock.get(key)) for side in (saved, current))
        if before != now and key.split(".")[0] not in _FREE:
            raise ThriftyError(f"{key} was {before!r} in {checkpoint.folder} and is now {now!r}; {start_over}")
    for key, now in fingerprints.items():
        if record["fingerprints"].get(key) != now:
            raise ThriftyError(f"{key}: its content is not what {checkpoint.folder} was trained with; {start_over}")


def warn_of_processes(checkpoint: Checkpoint, *, processes: int) -> None:
    """Say so where `checkpoint` was trained by another number of processes than go on from it."""
    worked = checkpoint.record().get("processes", processes)
    if worked != processes:
        _log.warning(
            "processes: %s was trained by %d and goes on with %d: each step has the same rows, but dropout and "
            "rounding differ, so the result is not to the bit that of an uninterrupted run",
            checkpoint.folder,
            worked,
            processes,
        )
