"""Low-damage Knowledge Implanting."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.method import Method, Part
from ..core.registry import method
from ..select.attributed import LowestAttributed
from ..select.layers import Layers
from ..update.in_place import InPlace

__all__ = ["loki"]


@method(
    family="row-sparse",
    paper="LoKI: Low-damage Knowledge Implanting of Large Language Models, arXiv 2505.22120",
    learning_rate=1e-3,
    cost="16 bytes per trained number; probe: 7 forwards and backwards per matrix and 4 rows of general text",
    needs_probe=True,
)
def loki(
    *,
    text: str | None = None,
    quota: float | str | None = None,
    target_modules: str | Sequence[str] | None = None,
    layers: Layers = None,
    joint: bool = False,
) -> Method:
    """Train, in place, those rows of each MLP's output matrix that matter least for general knowledge.

    Knowledge Vector Attribution: node i of W = down_proj puts out v_i; its attribution to the answer's logit P is
    `v_i / m * sum_k dP(k v / m) / dv_i`, m = 7. For each row of general text the lowest q % of the nodes of each layer
    are noted, and the q % most often noted are trained. `quota`: q; None: what the budget buys. `text`: a plain text
    file (the paper's is MMLU), for runs; with `attach`, pass batches of such text. Assumed: the answer of a plain text
    is the last token of a window; lowest is most negative; v is scaled at the answer's position alone. `joint: true`
    scales all layers at once, not one after the other: as many times cheaper as there are layers, not the paper's. The
    rows themselves are trained; the paper's other form, a low-rank pair on these rows, is not offered.

    When not to use it: where forgetting is no concern; better rows for the task are found by its gradients (smt).
    """
    select = LowestAttributed(quota=quota, target_modules=target_modules, layers=layers, joint=joint)
    return Method(name="loki", parts=(Part(select=select, update=InPlace()),), general=True, text=text)
