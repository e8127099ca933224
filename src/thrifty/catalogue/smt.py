"""Sparse Matrix Tuning."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.method import Method, Part
from ..core.registry import method
from ..schedule.every import Every
from ..select.blocks import BlockSize, TopBlocks
from ..update.in_place import InPlace

__all__ = ["smt"]


@method(
    family="block-sparse",
    paper="He, Li, Jiang, Miller: Sparse Matrix in Large Language Model Fine-tuning, arXiv 2405.15525",
    learning_rate=1e-3,
    cost="16 bytes per trained number; forward as the base model; backward dy W + dy[:, rows]^T x[:, cols] per block",
    needs_probe=True,
)
def smt(
    *,
    score: str = "abs_grad",
    scope: str = "per_matrix",
    block_size: BlockSize = "auto",
    target_modules: str | Sequence[str] = "all-linear",
    input_budget: float | str | None = None,
    spread: bool = False,
    reselect_every: int | None = None,
) -> Method:
    """Train, in place, only the blocks of the weights whose gradients are largest.

    Section 3 of the paper: cut each matrix W into l x l blocks B and score each by mean |dL/dW| over the block,
    measured on a few batches before training; keep the best blocks under the budget and train W[B] alone. The paper
    takes the best of all matrices, `scope: global`; the default takes the best of each, which was much better where
    they were compared (docs/defaults.md). Unlike the released code the probe changes no weight, so the result is
    block-sparse exactly. The paper's main runs use l = 256 and choose among Q, K and V: `block_size: 256`,
    `target_modules: [q_proj, k_proj, v_proj]`. It accumulates gradients over the batches before |.|: `score:
    accumulated_grad`; the default, `abs_grad`, takes |.| of each unit's gradient.

    Whole columns (one input to all outputs): `block_size: column`; `row` is whole rows, `[64, 16]` blocks of 64
    outputs by 16 inputs, `even` the same share of both sides. Gradients crowd into few inputs: with small blocks
    `spread: true` gives every strip of outputs and of inputs a block before any gets a second.
    `input_budget: 10%` bounds what backward keeps of activations: columns of inputs, shared by q, k, v and by gate, up,
    are chosen first, then blocks inside them.
    `score: input_norm` with columns is the paper's second variant, input channels by the size of their activations.
    `reselect_every: 100` (not in the paper) probes the same batches again every 100 steps: blocks that stay carry their
    values and moments, blocks that leave keep what they learned, and the result holds all that was ever trained.

    When not to use it: without labelled batches to probe (take random_blocks).
    """
    select = TopBlocks(
        score=score,
        scope=scope,
        block_size=block_size,
        target_modules=target_modules,
        input_budget=input_budget,
        spread=spread,
    )
    schedule = None if reselect_every is None else Every(period=reselect_every, key="reselect_every")
    return Method(name="smt", parts=(Part(select=select, update=InPlace()),), schedule=schedule)
