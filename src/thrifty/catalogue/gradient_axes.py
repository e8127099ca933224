"""Cores: each matrix trained along the main axes of its own gradient."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.method import Method, Part
from ..core.registry import method
from ..optim import Muon
from ..select.axes import GradientAxes
from ..select.layers import Layers
from ..update.in_place import InPlace

__all__ = ["gradient_axes"]


@method(
    family="low-rank-budget",
    paper="thrifty's own; the form is LoRA-XS's, arXiv 2405.17604, and axes from the gradient are LoRA-SB's, "
    "arXiv 2411.19557",
    learning_rate=2e-2,
    cost="12 bytes per trained number and 4 r (in + out) for the axes of each matrix; two products of width r each way",
    needs_probe=True,
)
def gradient_axes(
    *,
    r: int | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    layers: Layers = None,
) -> Method:
    """Train W + U R V^T: U and V hold the r main left and right singular vectors of the gradient, R alone is trained.

    The gradient is the mean over the probe's units before training; r is the largest whose r x r cores the budget buys
    in all matrices. R starts at zero. LoRA-XS takes U and V from W; LoRA-SB takes them from the first step's update,
    and starts R there. A LoRA pair of as many numbers has a rank of r^2 / (in + out), and learns by moving a matrix
    far along a few directions; a core moves it little along many. R moves by Muon: each step goes equally far along
    all its directions, and `learning_rate` is the spectral norm of a step. A run that gives `optim` takes that
    optimizer; to add tokens, give `optim: adamw_torch` and a rate for it, such as 3e-3.

    When not to use it: where the delta must be small (it holds r (in + out) numbers for each matrix, U and R V^T), or
    without labelled batches to probe.
    """
    select = GradientAxes(r=r, target_modules=target_modules, layers=layers)
    steps = Muon(momentum=0.9, size="spectral")
    return Method(name="gradient_axes", parts=(Part(select=select, update=InPlace()),), steps=steps)
