"""LocFT-BF: one matrix, ordinary mini-batches."""

from __future__ import annotations

from ..core.method import Method, Part
from ..core.registry import method
from ..select.matrices import Matrices
from ..update.in_place import InPlace

__all__ = ["locft_bf"]


@method(
    family="layer-selection",
    paper="Fine-tuning Done Right in Model Editing, arXiv 2509.22072",
    learning_rate=5e-4,
    cost="12 bytes per number of the matrix beside the model; backward stops at its layer",
)
def locft_bf(*, layer: int | str = "middle", module: str | None = None) -> Method:
    """Train one weight matrix of one layer, with ordinary mini-batches over all rows.

    The paper edits facts by fine-tuning W = mlp.down_proj of one layer, breadth first (epochs over all edits), where
    earlier work went depth first (each edit to convergence). Its layers: 22 of 32 (Llama-3-8B), 6 of 28 (Qwen2.5-7B);
    `layer` defaults to the middle. `module`: None for the matrix that writes the MLP's output, whatever its name
    (stacked experts count as one); or the ending of another's name, such as up_proj. End-of-text is always trained.

    When not to use it: for a new skill: one matrix holds facts, not much more.
    """
    select = Matrices(target_modules=None if module is None else [module], layers=layer)
    return Method(name="locft_bf", parts=(Part(select=select, update=InPlace()),))
