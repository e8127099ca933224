"""What a trainer puts into a checkpoint, and takes out of it again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from .checkpoint import Checkpoint, remove_old, whole_or_refuse, write_checkpoint
from .schedule import schedule_state
from .state import load_optimizer_state, load_scheduler_state, optimizer_state, random_state, set_random_state
from .zero_state import uncut

if TYPE_CHECKING:
    from .trainer import ThriftyTrainer

__all__ = ["load_optimizer_and_scheduler", "load_random", "load_running", "note_result", "save_checkpoint"]


def save_checkpoint(trainer: ThriftyTrainer) -> None:
    """Write `checkpoint-<step>` and remove those that are too many. All processes call it, the main one writes."""
    states = {
        "optimizer": optimizer_state(uncut(trainer.optimizer), trainer.tuning.named_leaves()),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "random": gather_object([random_state()]),
        **schedule_state(trainer.tuning),
    }
    if trainer.accelerator.scaler is not None:
        states["scaler"] = trainer.accelerator.scaler.state_dict()
    values = trainer.tuning.state()
    loss = trainer.accelerator.gather(trainer._tr_loss).mean().item()  # as logging will take it
    if trainer.metrics is not None:
        trainer.metrics.sync()
        folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        write_checkpoint(
            folder,
            values=values,
            plan=trainer.tuning.plan,
            states=states,
            trainer_state=_state_json(trainer.state),
            record={**trainer.record, **_measured(trainer, loss)},
        )
        remove_old(folder.parent, keep=trainer.args.save_total_limit or None)
    trainer.accelerator.wait_for_everyone()


def note_result(trainer: ThriftyTrainer, *, best: bool) -> None:
    """As `ThriftyTrainer.note_result`."""
    trainer.clock.pause()
    trainer.peak_memory_bytes = max(trainer.meter.peak(), trainer.record.get("peak_memory_bytes", 0))
    trainer.result_step = trainer.state.global_step
    if best and trainer.state.best_global_step not in (None, trainer.state.global_step):
        trainer.result_step = trainer.state.best_global_step
        checkpoint = Checkpoint(Path(trainer.args.output_dir) / f"checkpoint-{trainer.result_step}")
        whole_or_refuse(checkpoint, what="whose values are the best")
        trainer._load_from_checkpoint(str(checkpoint.folder))


def _measured(trainer: ThriftyTrainer, loss: float) -> dict[str, Any]:
    """What a resumed run carries on: seconds, peak memory, padded positions, the loss not logged yet, and whether an
    evaluation of this step was broken off."""
    running = {"loss": loss, "last_logged": trainer._globalstep_last_logged}
    return {
        "slots": trainer.slots_seen,
        "train_seconds": trainer.clock.seconds,
        "peak_memory_bytes": max(trainer.meter.peak(), trainer.record.get("peak_memory_bytes", 0)),
        "skipped_steps": trainer.finite.skipped,
        "running": running | {"evaluate": trainer.owes_evaluation},
    }


def _state_json(state: Any) -> str:
    kept = dataclasses.asdict(state)
    # metrics.jsonl keeps the rest; the intervals come from the configuration that resumes.
    kept["log_history"] = [entry for entry in state.log_history if "eval_loss" in entry]
    return json.dumps(kept | {"logging_steps": None, "eval_steps": None, "save_steps": None})


def load_optimizer_and_scheduler(trainer: ThriftyTrainer, checkpoint: Checkpoint) -> None:
    """Put back what `save_checkpoint` wrote of them."""
    with checkpoint.reading():
        load_optimizer_state(uncut(trainer.optimizer), checkpoint.state("optimizer"), trainer.tuning.named_leaves())
        load_scheduler_state(trainer.lr_scheduler, checkpoint.state("scheduler"))
        if trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(checkpoint.state("scaler"))


def load_random(trainer: ThriftyTrainer, checkpoint: Checkpoint) -> None:
    """Put back this process's random states."""
    with checkpoint.reading():
        states = checkpoint.state("random")
        set_random_state(states[trainer.args.process_index % len(states)])


def load_running(trainer: ThriftyTrainer, checkpoint: Checkpoint) -> bool:
    """Put back the loss that was not logged yet; returns whether the step's evaluation was broken off."""
    running = checkpoint.record()["running"]
    with checkpoint.reading():
        trainer._tr_loss += running["loss"]
        trainer._globalstep_last_logged = int(running["last_logged"])
    return bool(running.get("evaluate"))
