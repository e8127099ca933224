"""Low-rank Informed Sparse Fine-Tuning."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.method import Method, Part
from ..core.registry import method
from ..schedule.every import Every
from ..select.entries import TopEntries
from ..select.layers import Layers
from ..update.in_place import InPlace

__all__ = ["lift"]


@method(
    family="entry-sparse",
    paper="LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused Supervised "
    "Fine-Tuning, arXiv 2506.00772",
    learning_rate=1e-3,
    cost="16 bytes per trained number, 8 for its place; forward as the base model; backward dy W + dy^T x in pieces",
)
def lift(
    *,
    rank: int = 128,
    refresh: int | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    layers: Layers = None,
) -> Method:
    """Train, in place, the weights that are largest after a reduction of rank.

    The paper's principal weights: W_r is the best approximation of W of rank r (here by randomized SVD); in each matrix
    the entries with the largest |W_r| are trained. No data is looked at. Every `refresh` steps the mask is computed
    again from the weights as they are; entries that stay carry their moments, entries that leave keep their values. By
    default it stays as it is at the start, and so does the size of the result. Other defaults than the paper's: the
    budget is 1 % of the model, there 5 % of each matrix, or (in + out) times a LoRA rank; the mask is refreshed there.
    `rank` 128 is an assumption.

    When not to use it: where the budget is far below 1 %: a mask by gradient then holds more of what has to change.
    """
    select = TopEntries(
        score="low_rank_magnitude", scope="per_matrix", rank=rank, target_modules=target_modules, layers=layers
    )
    schedule = None if refresh is None else Every(period=refresh, key="refresh")
    return Method(name="lift", parts=(Part(select=select, update=InPlace()),), schedule=schedule)
