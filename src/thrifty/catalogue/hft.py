"""Half Fine-Tuning."""

from __future__ import annotations

from ..core.method import Method, Part
from ..core.registry import method
from ..schedule.every import Every
from ..select.halves import Halves
from ..update.in_place import InPlace

__all__ = ["hft"]


@method(
    family="layer-selection",
    paper="HFT: Half Fine-Tuning for Large Language Models, arXiv 2404.18466",
    learning_rate=2e-5,
    cost="12 bytes per trained number, half of the layers' numbers; backward dy W, and dy^T x for half of the matrices",
)
def hft(*, period: int = 100) -> Method:
    """Train a random half of every layer's matrices and norms for `period` steps, then another half.

    In each layer half of the attention matrices, half of the MLP's and half of the norms are trained, drawn anew for
    each round; the other half is frozen and bit-identical after it. Assumed, where the paper's text was not at hand:
    the split by category; of three MLP matrices one layer in two trains two, the others one; embeddings, final norm and
    head are trained always; a bias goes with its matrix; AdamW's state of what is frozen is dropped.

    When not to use it: where the result must be small: over rounds everything changes.
    """
    return Method(name="hft", parts=(Part(select=Halves(), update=InPlace()),), schedule=Every(period=period))
