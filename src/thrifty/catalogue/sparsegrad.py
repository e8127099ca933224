"""SparseGrad: the MLP in a basis in which its gradients are nearly sparse."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.method import Method, Part
from ..core.registry import method
from ..select.layers import Layers
from ..select.rotated import TopRotated
from ..update.in_place import InPlace

__all__ = ["sparsegrad"]


@method(
    family="entry-sparse",
    paper="SparseGrad: A Selective Method for Efficient Fine-tuning of MLP Layers, arXiv 2410.07383",
    learning_rate=2e-4,
    cost="20 bytes per number of the MLP, whatever the share, and in^2 + out^2 numbers per type; forward as the base "
    "model; backward as full training, and two products more per matrix and step each way",
    needs_probe=True,
)
def sparsegrad(
    *,
    share: float | str | None = None,
    target_modules: str | Sequence[str] | None = None,
    layers: Layers = None,
) -> Method:
    """Train the MLP in a rotated basis; each step takes only the largest gradients there, about 1 % of each matrix.

    Over the probe's units the gradients G of all matrices of one type (gate, up, down) give HOSVD's factors: V, the
    eigenvectors of the sum of G G^T, and U^T, those of the sum of G^T G. In their basis W' = V^T W U^T, and each step
    gives the optimizer the k largest |V^T G U^T| of each matrix and zeros. k is `share` of the matrix, or what the
    budget buys. The paper computes ((x U^T) W'^T) V^T; here W = V W' U is written after each step, which is the same
    model. Two differences under AdamW: the moments of numbers that a step leaves out decay and still move them, where
    the released SparseAdam rests; gradients are clipped before they are cut. The paper looks at 30 batches.

    When not to use it: for memory. Offsets and moments are kept for every number of the MLP, as the released code does,
    with a copy of its weights: more than full training of the MLP holds. On rows whose gradients share no directions
    with the probe's, the basis gains nothing.
    """
    select = TopRotated(share=share, target_modules=target_modules, layers=layers)
    return Method(name="sparsegrad", parts=(Part(select=select, update=InPlace()),))
