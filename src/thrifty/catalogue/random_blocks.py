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
    scope: str = "per_matrix",
    block_size: BlockSize = "auto",
    target_modules: str | Sequence[str] = "all-linear",
    input_budget: float | str | None = None,
    spread: bool = False,
) -> Method:
    """Train, in place, blocks chosen at random by the seed.

    Each matrix gets its share (`scope: global`: every block B is equally likely); W[B] alone is trained. With
    `input_budget: 10%` strips of inputs are drawn first, as in smt, then blocks inside them. It tells how much of
    another method's result is due to where it trains; with blocks of 8 it came out beside LoRA (docs/defaults.md).
    When not to use it: where backward should keep few inputs (smt's blocks crowd).
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
