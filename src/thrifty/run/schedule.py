"""A method whose plan changes, inside a run: how many steps there are, several processes, checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn.parallel import DistributedDataParallel

from thrifty.update.peer import PeerTuning
from thrifty.update.scheduled import ScheduledTuning
from thrifty.update.tuning import Tuning

from .checkpoint import Checkpoint

if TYPE_CHECKING:
    from .trainer import ThriftyTrainer

__all__ = ["follow", "restore", "schedule_state"]


def follow(tuning: Tuning | PeerTuning, *, trainer: ThriftyTrainer) -> None:
    """Tell a tuning with a schedule what it cannot know; once the trainer has wrapped the model."""
    if not isinstance(tuning, ScheduledTuning):
        return
    tuning.total_steps = trainer.state.max_steps
    wrapper = trainer.model_wrapped
    if isinstance(wrapper, DistributedDataParallel):
        tuning.rebuild = lambda: _count_again(wrapper)


def _count_again(wrapper: DistributedDataParallel) -> None:
    """Make the wrapper see which parameters are trained now: the training loop holds the object, so it stays."""
    DistributedDataParallel.__init__(
        wrapper,
        wrapper.module,
        device_ids=wrapper.device_ids,
        output_device=wrapper.output_device,
        broadcast_buffers=wrapper.broadcast_buffers,
        process_group=wrapper.process_group,
        find_unused_parameters=wrapper.find_unused_parameters,
        gradient_as_bucket_view=wrapper.gradient_as_bucket_view,
    )


def schedule_state(tuning: Tuning | PeerTuning) -> dict[str, Any]:
    """What a checkpoint keeps of it, under its name; nothing for a plan that stays."""
    return {"schedule": tuning.progress()} if isinstance(tuning, ScheduledTuning) else {}


def restore(tuning: Tuning | PeerTuning, checkpoint: Checkpoint) -> None:
    """Put the values of `checkpoint` back, with the plan that they belong to."""
    if isinstance(tuning, ScheduledTuning):
        tuning.restore(checkpoint.plan(), checkpoint.values(), checkpoint.state("schedule"))
    else:
        tuning.load_state(checkpoint.values())
