"""Random columns: a control."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.method import Method, Part
from ..core.registry import method
from ..select.blocks import TopBlocks
from ..select.layers import Layers
from ..update.in_place import InPlace

__all__ = ["random_columns"]


@method(
    family="control",
    paper="none: a control",
    learning_rate=1e-3,
    cost="16 bytes per trained number; forward as the base model; backward dy W + one product of the chosen columns",
)
def random_columns(
    *, scope: str = "global", target_modules: str | Sequence[str] = "all-linear", layers: Layers = None
) -> Method:
    """Train, in place, whole columns (input channels) chosen at random by the seed.

    Every column of the candidate matrices is equally likely; W[:, j] alone is trained. When not to use it: for quality;
    it tells how much of another method's result is due to where it trains.
    """
    select = TopBlocks(score="random", scope=scope, block_size="column", target_modules=target_modules, layers=layers)
    return Method(name="random_columns", parts=(Part(select=select, update=InPlace()),))
