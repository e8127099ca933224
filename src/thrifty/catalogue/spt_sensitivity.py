"""SPT: sensitivity decides between single weights and low-rank pairs."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.method import Method, Part
from ..core.registry import method
from ..select.layers import Layers
from ..select.sensitive import Sensitive
from ..update.in_place import InPlace

__all__ = ["spt_sensitivity"]


@method(
    family="low-rank-budget",
    paper="Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning, arXiv 2303.08566",
    learning_rate=1e-3,
    cost="16 bytes per trained number, 8 for the place of a single weight; a pair adds two narrow products each way",
    needs_probe=True,
)
def spt_sensitivity(
    *,
    r: int = 8,
    alpha: float = 16.0,
    threshold: float = 1.0,
    target_modules: str | Sequence[str] = "all-linear",
    layers: Layers = None,
) -> Method:
    """Give the budget to the most sensitive weights; matrices with many of them get a low-rank pair instead.

    One pass over task batches gives each weight's sensitivity s = sum over the probe's units of g^2 (one sample a unit
    with `probe_rows: 1`, as in the paper). The tau weights of highest s in all matrices are sensitive. A matrix with at
    least `threshold` times r (in + out) of them (more than that, in the paper) trains W + (alpha / r) B A, the others
    train their sensitive weights in place; tau is as large as the budget allows. The paper's structured part may also
    be an adapter; here it is a pair.

    When not to use it: where the base must stay readable while it trains, or the result be exact to the last bit: a
    pair is written into the weights only at the end, within rounding.
    """
    select = Sensitive(r=r, alpha=alpha, threshold=threshold, target_modules=target_modules, layers=layers)
    return Method(name="spt_sensitivity", parts=(Part(select=select, update=InPlace()),))
