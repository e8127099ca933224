"""Full fine-tuning."""

from __future__ import annotations

from ..core.method import Method, Part
from ..core.registry import method
from ..select.whole import Everything
from ..update.in_place import InPlace

__all__ = ["full"]


@method(
    family="baseline",
    paper="none: the common baseline",
    learning_rate=2e-5,
    cost="16 bytes per parameter of the model (float32; 20 on a bfloat16 base, which gets float32 offsets)",
)
def full() -> Method:
    """Train every parameter of the model.

    W <- W - lr * AdamW(dL/dW) for all W. A float32 tensor is trained itself; one of lower precision through a float32
    offset, so that small updates are not rounded away. When not to use it: where memory or the size of the result
    counts.
    """
    return Method(name="full", parts=(Part(select=Everything(), update=InPlace()),))
