"""Random entries: the control for every selection of single weights."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.method import Method, Part
from ..core.registry import method
from ..select.entries import TopEntries
from ..select.layers import Layers
from ..update.in_place import InPlace

__all__ = ["random_entries"]


@method(
    family="control",
    paper="none: a control; a random mask is also what SHiRA trains, arXiv 2406.13175",
    learning_rate=1e-3,
    cost="16 bytes per trained number, 8 for its place; forward as the base model; backward dy W + dy^T x in pieces",
)
def random_entries(
    *,
    scope: str = "global",
    target_modules: str | Sequence[str] = "all-linear",
    layers: Layers = None,
) -> Method:
    """Train, in place, single weights chosen at random by the seed.

    Every weight of the candidate matrices is equally likely (PEFT's SHiRA with a random mask is the peer). When not to
    use it: for quality; it tells how much of another method's result is due to where it trains.
    """
    select = TopEntries(score="random", scope=scope, target_modules=target_modules, layers=layers)
    return Method(name="random_entries", parts=(Part(select=select, update=InPlace()),))
