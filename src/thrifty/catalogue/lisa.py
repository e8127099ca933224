"""Layerwise Importance Sampled AdamW."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.method import Method, Part
from ..core.registry import method
from ..schedule.every import Every
from ..select.layer_sample import SampledLayers
from ..update.in_place import InPlace

__all__ = ["lisa"]


@method(
    family="layer-selection",
    paper="LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning, arXiv 2403.17919",
    learning_rate=2e-5,
    cost="12 bytes per number of the drawn layers, embeddings, norm and head; backward stops at the embeddings",
)
def lisa(*, layers: int = 2, period: int = 20, importance: Sequence[float] | None = None) -> Method:
    """Train a few random layers at a time, and the embeddings, the final norm and the head all the time.

    Every `period` steps `layers` (the paper's gamma) of the model's layers are drawn without replacement, with
    probabilities in proportion to `importance` (one number a layer; by default all alike, as in the paper's main runs).
    AdamW's state of layers that are frozen again is dropped; the rest goes on.

    When not to use it: where the result must be small: over time every layer changes.
    """
    select = SampledLayers(layers=layers, importance=importance)
    return Method(name="lisa", parts=(Part(select=select, update=InPlace()),), schedule=Every(period=period))
