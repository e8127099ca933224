"""Checkpoints: the trained values and all that a resumed run needs to end bit-identical, in safetensors and JSON.

checkpoint-120/
    values.safetensors              the trained leaves (float32: 4 bytes per trained number)
    optimizer.{json,safetensors}    AdamW: 8 bytes per trained number
    plan.json, plan.safetensors     what is trained
    schedule.{json,safetensors}     of a method whose plan changes: its step, what it keeps, what it trained before
    scheduler.json, random.{json,safetensors}, trainer_state.json
    record.json                     the run: configuration, processes, fingerprints, clock, evaluation before training
    complete.json                   written last: size and SHA-256 of every file above
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from thrifty.core.errors import ThriftyError
from thrifty.core.files import damage, disk_errors, new_folder, remove_folder
from thrifty.core.plan import Plan, plan_from_files, plan_to_files

from .state import load_state, save_state

__all__ = [
    "Checkpoint",
    "checkpoints",
    "claim",
    "find_checkpoint",
    "remove_later",
    "remove_old",
    "whole_or_refuse",
    "write_checkpoint",
]

MARKER = "complete.json"
_SHARE_OF_FREE_SPACE = 0.1  # a second checkpoint that takes no more than this is kept unasked
_log = logging.getLogger("thrifty")
_NAME = re.compile(r"checkpoint-(\d+)")


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
        with self.reading():
            return {name: tensor.clone() for name, tensor in load_file(self.folder / "values.safetensors").items()}

    def plan(self) -> Plan:
        file = self.folder / "plan.safetensors"
        with self.reading():
            tensors = {name: tensor.clone() for name, tensor in load_file(file).items()} if file.exists() else {}
            return plan_from_files(self._json("plan.json"), tensors)

    def record(self) -> dict[str, Any]:
        """What the run noted of itself; at least the keys that every run notes. ThriftyError where they are missing."""
        with self.reading():
            record = self._json("record.json")
            for key, kind in _RECORD.items():
                if not isinstance(record[key], kind):
                    raise TypeError(f"record.json: {key} is {record[key]!r}")
            return record

    def carried(self) -> dict[str, Any]:
        """What a run that goes on takes over from the record."""
        record = self.record()
        carried = {key: record[key] for key in ("before", "probe_seconds", "peak_memory_bytes", "slots")}
        return carried | {"skipped_steps": int(record.get("skipped_steps", 0))}

    def state(self, name: str) -> Any:
        """`optimizer`, `scheduler`, `random` or `schedule`."""
        with self.reading():
            return load_state(self.folder / name)

    def best_step(self) -> int | None:
        """The step with the lowest evaluation loss so far, whose checkpoint a run may have to go back to."""
        with self.reading():
            best = self._json("trainer_state.json").get("best_global_step")
            return None if best is None else int(best)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, what the folder's content makes fail is a ThriftyError that names the folder: its sums only say that
        these are the bytes that were written, not who wrote them."""
        try:
            yield
        except ThriftyError:
            raise
        except _MISREAD as error:
            raise ThriftyError(
                f"{self.folder} is no checkpoint that this version can read ({type(error).__name__}: "
                f"{' '.join(str(error).split())}): go on with the version that wrote it, or remove the folder"
            ) from error

    def _json(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


# What a run notes in `record.json`, and as what.
_RECORD = {
    "config": dict,
    "fingerprints": dict,
    "running": dict,
    "probe_seconds": float,
    "train_seconds": float,
    "peak_memory_bytes": int,
    "slots": int,
    "before": dict | None,
}
_MISREAD = (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError)


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


def _folders(output_dir: Path) -> list[Checkpoint]:
    """All that is named like a checkpoint, the oldest first."""
    found = [Checkpoint(folder) for folder in output_dir.glob("checkpoint-*") if _NAME.fullmatch(folder.name)]
    return sorted((c for c in found if c.folder.is_dir()), key=lambda c: c.step)


def checkpoints(output_dir: Path) -> list[Checkpoint]:
    """The complete checkpoints in `output_dir`, the oldest first; of damaged ones those whose files kept their size."""
    return [c for c in _folders(output_dir) if damage(c.folder, marker=MARKER, sums=False) is None]


def remove_old(output_dir: Path, *, keep: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best ones that these may go back to.

    None: the newest two, so that there is one before where the newest is damaged; one, where a checkpoint takes more
    than a tenth of the free space.
    """
    found = checkpoints(output_dir)
    if not found:
        return
    if keep is None:
        size = sum(file.stat().st_size for file in found[-1].folder.iterdir())
        keep = 2 if size <= _SHARE_OF_FREE_SPACE * shutil.disk_usage(output_dir).free else 1
    kept = {step for c in found[-keep:] for step in (c.step, c.best_step())}
    for checkpoint in _folders(output_dir):
        if checkpoint.step not in kept and checkpoint.step < found[-1].step:
            remove_folder(checkpoint.folder)


def remove_later(output_dir: Path, *, step: int) -> None:
    """Remove the checkpoints after `step`, damaged ones too: the run goes on from there."""
    for checkpoint in _folders(output_dir):
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
    """What `resume_from_checkpoint` asks for: `auto` (the newest, or none), true (the newest), a folder, or nothing.

    Every byte of it is compared with its sums. Of the newest, a damaged one falls back to the one before, which is
    said. ThriftyError where all are damaged, or the folder is.
    """
    if resume is None or resume is False:
        return None
    if resume is True or resume == "auto":
        return _newest(output_dir, needed=resume is True)
    folder = Path(resume)
    wrong = damage(folder, marker=MARKER) if _NAME.fullmatch(folder.name) else "it is not named checkpoint-<step>"
    if wrong is not None:
        around = folder if any(folder.glob("checkpoint-*")) else folder.parent
        names = ", ".join(str(c.folder) for c in checkpoints(around) if c.folder != folder) or "none"
        raise ThriftyError(
            f"resume_from_checkpoint: {resume!r} is no complete checkpoint: {wrong} (complete ones there: {names})"
        )
    return Checkpoint(folder)


def _newest(output_dir: Path, *, needed: bool) -> Checkpoint | None:
    found = _folders(output_dir)
    if not found and needed:
        raise ThriftyError(
            f"resume_from_checkpoint: {str(output_dir)!r} holds no complete checkpoint; 'auto' starts anew then"
        )
    said: list[str] = []
    for checkpoint in reversed(found):
        wrong = damage(checkpoint.folder, marker=MARKER)
        if wrong is None:
            if said:
                _log.warning("%s; going on with the one before, %s", "; ".join(said), checkpoint.folder)
            return checkpoint
        said.append(f"{checkpoint.folder} is damaged ({wrong})")
    if said:
        raise ThriftyError(
            f"resume_from_checkpoint: {'; '.join(said)}: none is left to go on with; put back a copy, or remove "
            f"{'these folders' if len(said) > 1 else 'this folder'} to start anew"
        )
    return None


def whole_or_refuse(checkpoint: Checkpoint, *, what: str) -> None:
    """ThriftyError where `checkpoint`, which is `what`, is damaged."""
    wrong = damage(checkpoint.folder, marker=MARKER)
    if wrong is not None:
        raise ThriftyError(
            f"{checkpoint.folder}, {what}, is damaged ({wrong}): put back a copy, or take the last values as the "
            "result with resume_from_checkpoint=auto load_best_model_at_end=false"
        )
