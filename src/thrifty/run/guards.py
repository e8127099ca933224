"""What must hold while training, checked where it first can be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from thrifty.core.errors import ThriftyError
from thrifty.update.peer import PeerTuning
from thrifty.update.sharded import whole
from thrifty.update.tuning import Tuning

from .schedule import follow

if TYPE_CHECKING:
    from .trainer import ThriftyTrainer

__all__ = ["Guards", "refuse_lost_loss"]


def refuse_lost_loss(loss: float, *, state: Any, args: TrainingArguments) -> None:
    """ThriftyError where the logged training loss is not finite; fp16 skips such steps by itself."""
    if not math.isfinite(loss) and not args.fp16:
        raise ThriftyError(
            f"the training loss is {loss} at step {state.global_step}: "
            f"lower learning_rate (now {args.learning_rate:g}) or give warmup_steps"
        )


class Guards(TrainerCallback):
    """An evaluation batch fits, gradients reach every leaf, values move; and saving waits for the end of an epoch."""

    def __init__(self, trainer: ThriftyTrainer, tuning: Tuning | PeerTuning) -> None:
        self.trainer = trainer
        self.tuning = tuning
        self.checked_gradients = False
        self.had_gradient = False
        self.moved = False

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        follow(self.tuning, trainer=self.trainer)
        if not self.trainer.is_over:
            self.trainer.try_evaluation()
        self.trainer.stop.saves = args.save_strategy != SaveStrategy.NO

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.finite.begin()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.finite.before_step()
        if self.trainer.finite.skipping:
            return
        if self.trainer.is_deepspeed_enabled:  # its engine has stepped already, and keeps no gradient
            norm = self.trainer.finite.norm
            self.had_gradient = norm is None or norm > 0
            return
        if not self.checked_gradients:
            self.tuning.check_gradients()
            self.checked_gradients = True
        if not self.moved:  # asked before the step, after which other leaves may be trained
            gradients = [leaf.grad for leaf in self.tuning.named_leaves().values()]
            self.had_gradient = any(gradient is not None and bool(whole(gradient).any()) for gradient in gradients)

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        skipped = self.trainer.finite.skipping
        self.trainer.finite.end()
        optimizer = kwargs["optimizer"]
        # In warm-up the rate is 0; a batch without labels has no gradient; fp16 skips its first steps.
        if (
            skipped
            or self.moved
            or optimizer.step_was_skipped
            or not any(group["lr"] > 0 for group in optimizer.param_groups)
        ):
            return
        if self.had_gradient:
            self.tuning.check_changed()
            self.moved = True

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.must_stop:
            control.should_save = True

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.in_epoch = True

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.in_epoch = False
        if self.trainer.save_at_epoch_end:
            self.trainer.save_at_epoch_end = False
            control.should_save = True

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.stop.saves = False
        began = self.trainer._initial_global_step  # above 0: resumed, and what was trained before had moved
        if not self.moved and state.global_step > began == 0:
            raise ThriftyError(
                f"{state.global_step} steps moved no trained value: every gradient or learning rate was 0; "
                "check learning_rate, warmup_steps and the labels; with grpo, whether rewards differ within a group"
            )
