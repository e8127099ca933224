"""The selection half of SensZOQ: sensitive entries."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.method import Method, Part
from ..core.registry import method
from ..select.entries import TopEntries
from ..select.layers import Layers
from ..update.in_place import InPlace

__all__ = ["senszo_mask"]


@method(
    family="entry-sparse",
    paper="Zeroth-Order Fine-Tuning of LLMs with Extreme Sparsity, arXiv 2406.02913",
    learning_rate=1e-3,
    cost="16 bytes per trained number, 8 for its place; forward as the base model; backward dy W + dy^T x in pieces",
    needs_probe=True,
)
def senszo_mask(
    *, text: str | None = None, target_modules: str | Sequence[str] = "all-linear", layers: Layers = None
) -> Method:
    """Train, in place, the 0.1 % of all entries to which the loss on general text is most sensitive.

    Entries with the largest mean g² (the diagonal of the Fisher information) over general text, the best of all
    matrices together; `budget` sets another share. The mask does not know the task: choose it once and use it again
    (`saved`). `text`: a plain text file, for runs (the paper's is C4); with `attach`, pass batches of such text. The
    paper then quantizes the rest and trains without gradients; here the entries are trained with gradients. Assumed
    (recalled): C4 and the Fisher score; g² is averaged over units of rows, not over tokens.

    When not to use it: where task data are at hand and forgetting is no concern (gps, smt).
    """
    select = TopEntries(score="squared_grad", share=0.001, target_modules=target_modules, layers=layers)
    return Method(name="senszo_mask", parts=(Part(select=select, update=InPlace()),), general=True, text=text)
