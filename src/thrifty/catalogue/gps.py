"""Gradient-based Parameter Selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..core.errors import ThriftyError, unknown
from ..core.method import Method, Part
from ..core.registry import method
from ..select.entries import TopEntries
from ..select.layers import Layers
from ..update.in_place import InPlace

__all__ = ["gps"]

_LOSSES = ("task", "contrastive")


@method(
    family="entry-sparse",
    paper="Gradient-based Parameter Selection for Efficient Fine-Tuning, arXiv 2312.10136",
    learning_rate=1e-3,
    cost="16 bytes per trained number, 8 for its place; forward as the base model; backward dy W + dy^T x in pieces",
    needs_probe=True,
)
def gps(
    *,
    per_row: int | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    layers: Layers = None,
    loss: Literal["task", "contrastive"] = "task",
) -> Method:
    """Train, in place, for every neuron the K incoming weights whose gradients are largest.

    One pass over task batches gives the gradient g; in each row of each matrix the K entries with the largest |g| are
    trained, so that every neuron stays adjustable. K is `per_row`, or what the budget buys. By default g
    is that of the training loss. `loss: contrastive` takes the paper's instead, the supervised contrastive loss of
    features, which needs no head: the feature is the last hidden state at the last token before the answer, rows with
    the same answer are one class. Assumed, for the catalogue does not say: the loss L_out of Khosla et al. (2020),
    temperature 0.1, over the rows of one unit (`probe_rows`, so raise it where there are many classes).

    When not to use it: where memory for kept inputs counts: entries in every row need nearly every input column.
    """
    if loss not in _LOSSES:
        raise ThriftyError(unknown("loss", str(loss), _LOSSES))
    select = TopEntries(
        score="signed_grad", scope="per_row", per_row=per_row, target_modules=target_modules, layers=layers
    )
    return Method(name="gps", parts=(Part(select=select, update=InPlace()),), loss=loss)
