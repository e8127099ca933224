"""Choosing anew every so many steps, by the method's own selectors."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..core.errors import ThriftyError
from ..update.scheduled import ScheduledTuning

__all__ = ["Every", "check_period"]


def check_period(value: object, *, key: str = "period", least: int = 1) -> None:
    """ThriftyError where `value` is no whole number of at least `least` steps."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ThriftyError(f"{key} {value!r} is not valid: give a number of steps of {least} or more")


@dataclass(frozen=True, kw_only=True)
class Every:
    """Every `period` steps the selectors choose again, on the weights as they are then and with a seed of that round.
    Those that look at gradients see the batches of the start again."""

    period: int
    key: str = "period"

    def __post_init__(self) -> None:
        check_period(self.period, key=self.key)

    def before_step(self, tuning: ScheduledTuning) -> None:
        """Nothing to do."""

    def after_step(self, tuning: ScheduledTuning) -> None:
        if tuning.step % self.period:
            return
        seed = random.Random(f"{tuning.seed}/{tuning.step // self.period}").getrandbits(31)
        tuning.replan(lambda model: tuning.choose(model, seed=seed))
