"""Telly: freeze the bottom layers."""

from __future__ import annotations

from ..core.method import Method, Part
from ..core.registry import method
from ..select.tensors import Tensors
from ..update.in_place import InPlace

__all__ = ["telly"]


@method(
    family="layer-selection",
    paper="Towards Efficient Fine-tuning of Pre-trained Code Models: An Experimental Study and Beyond, "
    "arXiv 2304.05216",
    learning_rate=2e-5,
    cost="12 bytes per trained number beside the model; backward stops at the lowest trained layer",
)
def telly(*, freeze: int = -2) -> Method:
    """Train the layers from `freeze` upwards, the final norm and, where it is not tied, the head; nothing below.

    Telly-K freezes the embeddings and the bottom K layers; the paper finds that only the top two layers of code models
    change much. `freeze`: how many layers stay frozen (a negative number counts from the top: -2 trains the top two).
    The paper chooses K by how much each layer's representation changes (RSA, CKA); that report is not made here, K is
    given. Assumed, for only its abstract and its code's README were at hand: a tied head is frozen as the embedding is.

    When not to use it: where the task's language is new to the model, which lower layers would have to learn.
    """
    select = Tensors(layers=f"{freeze}:", after=True)
    return Method(name="telly", parts=(Part(select=select, update=InPlace()),))
