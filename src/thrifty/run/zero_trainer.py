"""The trainer under DeepSpeed: its engine takes the steps, our checkpoints keep what they always keep."""

from __future__ import annotations

import os
from typing import Any

from .trainer import ThriftyTrainer
from .zero_state import take_over

__all__ = ["ZeroTrainer"]


class ZeroTrainer(ThriftyTrainer):
    """`ThriftyTrainer` whose model is DeepSpeed's engine while it trains."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # which accelerate leaves for the next run in this process

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # the engine reads only its own
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
            take_over(self.tuning.parameters())
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def unwrap(self) -> None:
        """Take DeepSpeed's hooks off the model."""
        self.deepspeed.destroy()
        super().unwrap()
