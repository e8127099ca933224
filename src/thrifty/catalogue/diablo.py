"""DiaBlo: diagonal blocks."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.method import Method, Part
from ..core.registry import method
from ..select.diagonal import Diagonal
from ..select.layers import Layers
from ..update.in_place import InPlace

__all__ = ["diablo"]


@method(
    family="block-sparse",
    paper="DiaBlo: Diagonal Blocks Are Sufficient For Finetuning, arXiv 2506.03230",
    learning_rate=1e-3,
    cost="16 bytes per trained number, 1/blocks of the matrices; forward as the base model; backward dy W + N products",
)
def diablo(*, blocks: int = 64, target_modules: str | Sequence[str] = "all-linear", layers: Layers = None) -> Method:
    """Train, in place, the N blocks on the diagonal of each matrix; nothing is selected.

    W + blockdiag(D_1 ... D_N), each D of ceil(out / N) x ceil(in / N), the last ones smaller where N does not divide.
    The paper adds the blocks as a module; written into W they cost nothing at inference and give the same numbers.

    When not to use it: where backward should keep few inputs (every input has a block).
    """
    select = Diagonal(blocks=blocks, target_modules=target_modules, layers=layers)
    return Method(name="diablo", parts=(Part(select=select, update=InPlace()),))
