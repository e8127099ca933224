"""The evaluation loss while training: running sums over batches, no logits, all processes together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from thrifty.core.errors import ThriftyError
from thrifty.objective import sum_loss

if TYPE_CHECKING:
    from .trainer import Row, ThriftyTrainer

__all__ = ["EvalLoss"]


class EvalLoss:
    """Mean loss per label of `rows`, the longest first: the largest batch fails first, and little is padded."""

    def __init__(self, rows: Sequence[Row], *, trainer: ThriftyTrainer) -> None:
        self._rows = sorted(rows, key=lambda row: -len(row["input_ids"]))
        self._trainer = trainer

    def mean(self, *, first_batch_only: bool = False, broken_off: Callable[[], bool] = lambda: False) -> float | None:
        """The mean, or only that of each process's first batch; None where `broken_off`, asked before each batch, said
        so. ThriftyError where a batch does not fit into memory."""
        trainer, args = self._trainer, self._trainer.args
        batches = math.ceil(len(self._rows) / (args.per_device_eval_batch_size * args.world_size))
        training = trainer.model.training
        trainer.model.eval()
        found = []
        for number in range(1 if first_batch_only else batches):
            if broken_off():
                break
            found.append(self._sum(number))
        trainer.model.train(training)
        if len(found) < (1 if first_batch_only else batches):
            return None
        sums = torch.tensor(found, dtype=torch.float64)
        total, count = trainer.accelerator.reduce(sums.sum(0).to(args.device), reduction="sum").tolist()
        return total / max(count, 1)

    def _sum(self, number: int) -> tuple[float, int]:
        """Loss sum and label count of this process's part of batch `number`."""
        trainer, args = self._trainer, self._trainer.args
        size = args.per_device_eval_batch_size
        first = (number * args.world_size + args.process_index) * size
        rows = self._rows[first : first + size]
        if not rows:  # every process runs the same number of forwards
            rows = [{"input_ids": self._rows[-1]["input_ids"], "labels": [-100] * len(self._rows[-1]["labels"])}]
        try:
            with torch.no_grad(), trainer.compute_loss_context_manager():
                total, count = sum_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
        except torch.OutOfMemoryError as error:
            raise ThriftyError(
                f"out of memory in an evaluation batch of {len(rows)} rows of {len(rows[0]['input_ids'])} tokens: "
                f"lower per_device_eval_batch_size (now {size}) or max_length"
            ) from error
        return float(total), count
