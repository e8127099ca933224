"""GreenTrainer: adaptive backpropagation."""

from __future__ import annotations

from ..core.budget import share_of
from ..core.method import Method, Part
from ..core.registry import method
from ..schedule.within_flops import WithinFlops
from ..select.whole import Everything
from ..update.in_place import InPlace

__all__ = ["greentrainer"]


@method(
    family="layer-selection",
    paper="Towards Green AI in Fine-tuning Large Language Models via Adaptive Backpropagation, arXiv 2309.13192",
    learning_rate=2e-5,
    cost="12 bytes per trained number; backward at most rho of the full one, but for two full steps in each period",
)
def greentrainer(*, rho: float | str = 0.5, period: int = 100) -> Method:
    """Train the tensors that lower the loss most, within a share `rho` of the full backward's FLOPs.

    Importance of a tensor: -(g . dw), dw its last update, g the gradient after it. Cost of a set S: the sum of t_dw
    (own gradient) over S plus the sum of t_dy (passing the activations' gradient) down to the deepest of S. Dynamic
    programming, with FLOPs in thousandths of the full backward's, finds the S of the largest importance with a cost of
    at most rho of it. Each period begins with two steps of all tensors, as `full` makes them: they give dw and g.

    Assumed: tensors lie on one chain in the order of the forward; products between activations, which depend on the
    length, are left out. When not to use it: where those two full steps do not fit in memory.
    """
    return Method(
        name="greentrainer",
        parts=(Part(select=Everything(), update=InPlace()),),
        schedule=WithinFlops(rho=share_of(rho, key="rho"), period=period),
    )
