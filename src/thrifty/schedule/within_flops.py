"""The tensors that lower the loss most for what their backward costs, measured anew every so many steps."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import nn

from ..core.errors import ThriftyError
from ..core.plan import Plan
from ..core.region import Whole
from ..select.flops import backward_chain, chain_flops
from ..select.knapsack import best_under
from ..select.whole import Everything
from ..update.scheduled import ScheduledTuning
from .every import check_period

__all__ = ["WithinFlops"]

_log = logging.getLogger("thrifty")


@dataclass(frozen=True, kw_only=True)
class WithinFlops:
    """Every `period` steps: one step of all tensors gives each one's change, the next one's gradient how much that
    change lowered the loss; then the best set within `rho` of the full backward's FLOPs is trained."""

    rho: float
    period: int

    def __post_init__(self) -> None:
        check_period(self.period, least=3)

    def before_step(self, tuning: ScheduledTuning) -> None:
        place, leaves = tuning.step % self.period, tuning.named_leaves()
        if place == 0:
            tuning.memory = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        elif place == 1:
            sums = {n: _product(leaves[n].grad, change) for n, change in tuning.memory.items()}
            tuning.memory = {name: -float(value) for name, value in sums.items()}

    def after_step(self, tuning: ScheduledTuning) -> None:
        place = tuning.step % self.period
        if place == 0:
            tuning.replan(lambda model: Everything().select(model, probe=None, budget=None, seed=0))
        elif place == 1:
            for name, leaf in tuning.named_leaves().items():
                tuning.memory[name] = leaf.detach() - tuning.memory[name]
        elif place == 2:
            importance, tuning.memory = tuning.memory, {}
            tuning.replan(lambda model: self._plan(model, importance))

    def _plan(self, model: nn.Module, importance: dict[str, float]) -> Plan:
        wrong = next((name for name, value in importance.items() if not math.isfinite(value)), None)
        if wrong is not None:
            raise ThriftyError(
                f"how much {wrong} lowered the loss is not finite: training diverged, or the loss overflows on this "
                "data; lower learning_rate"
            )
        chain, largest, least = backward_chain(model), max(importance.values()), min(importance.values())
        if largest <= 0:  # every change raised the loss: those that raised it least come first
            importance = {name: value - least + 1e-6 * (largest - least or 1.0) for name, value in importance.items()}
        full = chain_flops(chain, {link.name for link in chain if link.name is not None})
        chosen = best_under(chain, importance, ceiling=self.rho * full)
        if not chosen:
            raise ThriftyError(f"rho {self.rho} is too little for any tensor of this model: raise rho")
        share = chain_flops(chain, chosen) / full
        _log.info(
            "%d of %d tensors for %.1f%% of the full backward's FLOPs: %s",
            len(chosen),
            len(importance),
            100 * share,
            ", ".join(sorted(chosen)),
        )
        return Plan.of(model, {name: Whole() for name in chosen})


def _product(gradient: torch.Tensor | None, change: torch.Tensor) -> float:
    return 0.0 if gradient is None else float((gradient.double() * change.double()).sum())
