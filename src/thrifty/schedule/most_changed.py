"""Train everything, keep what changed most, start again from the base with these numbers alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.budget import Budget, share_of
from ..core.errors import ThriftyError
from ..core.plan import Plan
from ..select.entries import BestEntries
from ..update.scheduled import ScheduledTuning

__all__ = ["MostChanged"]


@dataclass(frozen=True, kw_only=True)
class MostChanged:
    """After `phase1` steps, or that share of all steps, the plan becomes the numbers with the largest change, as many
    as the budget buys; all weights go back to the base and the optimizer starts afresh."""

    phase1: int | float | str

    def __post_init__(self) -> None:
        if isinstance(self.phase1, bool) or (isinstance(self.phase1, int) and self.phase1 < 1):
            raise ThriftyError(f"phase1 {self.phase1!r} is not valid: give a share of the steps (0.5) or their number")
        if not isinstance(self.phase1, int) and share_of(self.phase1, key="phase1") == 1:
            raise ThriftyError("phase1 leaves no step for the second phase: give a share below 1, such as 0.5")

    def _last(self, tuning: ScheduledTuning) -> int:
        """How many steps the first phase has: fixed when first asked, for a resumed run may be given more steps."""
        if "phase1" not in tuning.memory:
            steps = self.phase1
            if not isinstance(steps, int):
                if tuning.total_steps is None:
                    raise ThriftyError(
                        f"phase1 {steps!r} is a share of the steps, and nobody said how many there are: "
                        "set tuning.total_steps, or give phase1 as a number of steps"
                    )
                steps = max(1, int(share_of(steps, key="phase1") * tuning.total_steps))
            if tuning.total_steps is not None and steps >= tuning.total_steps:
                raise ThriftyError(
                    f"phase1 takes all {tuning.total_steps} steps and leaves none for the second phase: lower it"
                )
            tuning.memory["phase1"] = steps
        last: int = tuning.memory["phase1"]
        return last

    def before_step(self, tuning: ScheduledTuning) -> None:
        self._last(tuning)

    def after_step(self, tuning: ScheduledTuning) -> None:
        if tuning.step != self._last(tuning):
            return
        best = BestEntries((tuning.budget or Budget(fraction=0.01)).of(tuning.plan.total))
        for name, change in tuning.changes():
            if not bool(torch.isfinite(change).all()):
                raise ThriftyError(
                    f"the change of {name} after {tuning.step} steps is not finite: training diverged; "
                    "lower learning_rate"
                )
            best.add(name, change.abs().flatten().cpu())
        regions = best.regions()
        tuning.rewind()
        tuning.replan(lambda model: Plan.of(model, regions), carry=False)
