"""Losses and gradients that are not finite: nothing is updated by them, their rows are named, and the run stops or
goes on without that step (`nonfinite`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from thrifty.core.errors import ThriftyError

__all__ = ["FiniteSteps"]

_IN_A_ROW = 10  # so many steps passed over one after the other are no accident of their rows
_NAMED = 8
_log = logging.getLogger("thrifty")


class _Trainer(Protocol):
    args: Any
    state: Any
    accelerator: Any
    _tr_loss: Tensor
    _globalstep_last_logged: int

    def rows_of_step(self, parts: Sequence[tuple[int, int]] | None) -> list[str]: ...


class FiniteSteps:
    """What one trainer's steps were, asked before each optimizer step.

    A step is lost where the loss of one of its micro-batches, or the norm of its gradient, is not finite. Under fp16
    only the loss counts: an infinite gradient is how the loss scale finds its size, and such steps are left out by the
    scaler itself. `skipped`: how many steps were passed over.
    """

    def __init__(self, trainer: _Trainer, *, skips: bool, skipped: int = 0) -> None:
        self.trainer, self.skips, self.skipped = trainer, skips, skipped
        self.skipping = False
        self.norm: Any = None
        self._in_a_row = 0
        self._parts: list[tuple[int, int]] = []
        self._seen = 0
        self._loss = "not finite"
        self._loss_before: Tensor | None = None

    def begin(self) -> None:
        """A step begins."""
        self._parts, self._seen, self._loss, self.norm = [], 0, "not finite", None
        self._loss_before = self.trainer._tr_loss.clone()

    def note(self, loss: Tensor, finite: Sequence[bool]) -> None:
        """After a micro-batch: this process's loss, and for each process whether its loss is finite."""
        self._parts += [(self._seen, process) for process, good in enumerate(finite) if not good]
        self._seen += 1
        if not all(finite) and not math.isfinite(value := float(loss)):
            self._loss = str(value)

    def before_step(self) -> None:
        """Before the optimizer's step: ThriftyError, or the step is left out, where it is lost."""
        scaler = self.trainer.accelerator.scaler
        lost_gradient = scaler is None and self.norm is not None and not math.isfinite(float(self.norm))
        if not self._parts and not lost_gradient:
            self._in_a_row = 0
            return
        step = self.trainer.state.global_step + 1
        what = f"training loss is {self._loss}" if self._parts else "gradient is not finite"
        named = self.trainer.rows_of_step(self._parts or None)
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        rows = f", in rows {', '.join(named[:_NAMED])}{more}" if named else ""
        rate = f"lower learning_rate (now {self.trainer.args.learning_rate:g}) or give warmup_steps"
        self._in_a_row += 1
        if not self.skips:
            raise ThriftyError(
                f"the {what} at step {step}{rows}: no value was changed by it; look at these rows, {rate}, or pass "
                "over such steps with nonfinite=skip"
            )
        if self._in_a_row == _IN_A_ROW:
            raise ThriftyError(f"the {what} at step {step}{rows}, the {_IN_A_ROW}th in a row: {rate}")
        self.skipped += 1
        _log.warning("step %d is passed over: the %s%s", step, what, rows)
        self.skipping = True
        self.trainer.accelerator.gradient_state._set_sync_gradients(False)  # accelerate's optimizer does nothing then
        if scaler is not None:
            scaler.update()  # the norm has unscaled the gradients, which may be done once in each round

    def end(self) -> None:
        """After the optimizer's step: a lost one does not count in the mean loss that is logged."""
        if self.skipping:
            self.skipping = False
            self.trainer.accelerator.gradient_state._set_sync_gradients(True)
            assert self._loss_before is not None
            self.trainer._tr_loss.copy_(self._loss_before)
            self.trainer._globalstep_last_logged += 1
