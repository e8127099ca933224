"""Magnitude: the largest weights."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.method import Method, Part
from ..core.registry import method
from ..select.entries import TopEntries
from ..select.layers import Layers
from ..update.in_place import InPlace

__all__ = ["magnitude"]


@method(
    family="control",
    paper="none: a control; the baseline of LIFT, arXiv 2506.00772",
    learning_rate=1e-3,
    cost="16 bytes per trained number, 8 for its place; forward as the base model; backward dy W + dy^T x in pieces",
)
def magnitude(
    *,
    scope: str = "global",
    target_modules: str | Sequence[str] = "all-linear",
    layers: Layers = None,
) -> Method:
    """Train, in place, the single weights that are largest.

    Entries by |W|, within `scope`. A control for selections that look at gradients or at a low-rank approximation. When
    not to use it: where a labelled batch is at hand (take smt or gps).
    """
    select = TopEntries(score="magnitude", scope=scope, target_modules=target_modules, layers=layers)
    return Method(name="magnitude", parts=(Part(select=select, update=InPlace()),))
