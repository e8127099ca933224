"""Random blocks: the control for every selection by gradient."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.method import Method, Part
from ..core.registry import method
from ..select.blocks import BlockSize, TopBlocks
from ..update.in_place import InPlace

__all__ = ["random_blocks"]


@method(
    family="control",
    paper="none: the control that SMT's reviewers asked for",
    learning_rate=1e-3,
    cost="as smt, without the probe",
)
def random_blocks(
    *,
    scope: str = "global",
    block_size: BlockSize = "auto",
    target_modules: str | Sequence[str] = "all-linear",
    input_budget: float | str | None = None,
    spread: bool = False,
) -> Method:
    """Train, in place, blocks chosen at random by the seed.

    Every block B of the candidate matrices is equally likely; W[B] alone is trained. With `input_budget: 10%` strips of
    inputs are drawn first, as in smt, then blocks inside them. When not to use it: for quality;
    it tells how much of another method's result is due to where it trains.
    """
    select = TopBlocks(
        score="random",
        scope=scope,
        block_size=block_size,
        target_modules=target_modules,
        input_budget=input_budget,
        spread=spread,
    )
    return Method(name="random_blocks", parts=(Part(select=select, update=InPlace()),))
