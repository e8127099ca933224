"""Whole columns by gradient, moved by Muon."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.method import Method, Part
from ..core.registry import method
from ..optim import Muon
from ..select.blocks import TopBlocks
from ..select.layers import Layers
from ..update.in_place import InPlace

__all__ = ["muon_columns"]


@method(
    family="block-sparse",
    paper="thrifty's own; gradients choose as in SMT, arXiv 2405.15525, and Muon is Jordan's 2024",
    learning_rate=2.5e-3,
    cost="12 bytes per trained number; forward as the base model; backward dy W + one product of the chosen columns",
    needs_probe=True,
)
def muon_columns(
    *,
    score: str = "abs_grad",
    scope: str = "per_matrix",
    target_modules: str | Sequence[str] = "all-linear",
    layers: Layers = None,
) -> Method:
    """Train, in place, the whole columns of each matrix whose gradients are largest, those of a matrix as one by Muon.

    W[:, columns] is a tall matrix; each step moves it equally far along all its directions, where AdamW treats each
    number alone. Its gradient is one dense product, dy^T x[:, columns], and backward keeps the chosen inputs only. One
    state per number, where AdamW has two. The learning rate is five times the root mean square of a step's numbers, so
    AdamW's carry over; a run that gives `optim` takes that optimizer. Evidence: docs/results/leads.md and plateau.md.

    When not to use it: where the model must keep what it knew (it forgot twice as much as LoRA of the same size), or
    without labelled batches to probe (take random_columns with `optim: muon`).
    """
    select = TopBlocks(score=score, scope=scope, block_size="column", target_modules=target_modules, layers=layers)
    return Method(name="muon_columns", parts=(Part(select=select, update=InPlace()),), steps=Muon())
