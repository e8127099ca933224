"""Lottery Ticket Sparse Fine-Tuning (LT-SFT), of Composable Sparse Fine-Tuning."""

from __future__ import annotations

from ..core.method import Method, Part
from ..core.registry import method
from ..schedule.most_changed import MostChanged
from ..select.whole import Everything
from ..update.in_place import InPlace

__all__ = ["composable_sft"]


@method(
    family="entry-sparse",
    paper="Composable Sparse Fine-Tuning for Cross-Lingual Transfer, arXiv 2110.07560",
    learning_rate=2e-5,
    cost="first phase as full; then 16 bytes per trained number, 8 for its place; backward dy W + dy^T x in pieces",
)
def composable_sft(*, phase1: int | float | str = 0.5) -> Method:
    """Train everything, keep the numbers that changed most, start again from the base with these alone.

    Phase 1 is full fine-tuning for `phase1`: a share of the run's steps, or a number of steps (needed in a loop of your
    own, unless it sets `tuning.total_steps`). Then the K numbers with the largest |theta1 - theta0| of the whole model
    are kept, K the budget; all weights go back to theta0 bit for bit, and phase 2 trains these K with a fresh AdamW.
    The result is a delta of K numbers. The paper adds those of several runs, theta0 + phi_task + phi_language; that
    cannot be done here yet: a delta refuses a tensor that another delta has changed. Nor is there the pull towards
    theta0 (L1), optional in the paper; and the learning rate's schedule runs over both phases once, where the paper
    starts it again. In phase 1 it trains as `full` does.

    When not to use it: where memory is short: the first phase needs that of full fine-tuning.
    """
    return Method(
        name="composable_sft",
        parts=(Part(select=Everything(spends=True), update=InPlace()),),
        schedule=MostChanged(phase1=phase1),
    )
