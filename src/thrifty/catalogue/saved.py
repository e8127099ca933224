"""A selection made before."""

from __future__ import annotations

from ..core.method import Method, Part
from ..core.registry import method
from ..select.saved import Saved
from ..update.in_place import InPlace

__all__ = ["saved"]


@method(
    family="control",
    paper="none: the plan of another run",
    learning_rate=1e-3,
    cost="that of the method that made the plan, without its probe",
)
def saved(*, plan: str) -> Method:
    """Train, in place, what an earlier run trained: on another task, or a model of the same shape.

    `plan`: the folder of a finished run, of its delta, or of a checkpoint; of sparsegrad a checkpoint, for its deltas
    hold no basis. Only the places are read, no values.

    When not to use it: where the task is far from the first and there are labelled batches to choose anew.
    """
    return Method(name="saved", parts=(Part(select=Saved(plan=plan), update=InPlace()),))
