"""SPAFIT: more is trained the higher the layer."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.method import Method, Part
from ..core.registry import method
from ..select.layers import Layers
from ..select.tensors import Tensors
from ..update.in_place import InPlace
from ..update.low_rank import LowRank

__all__ = ["spafit"]

_QUERY_VALUE = r".*\.(q_proj|v_proj|query|value|q_lin|v_lin|c_attn|qkv_proj|query_key_value)"


@method(
    family="layer-selection",
    paper="SPAFIT: Stratified Progressive Adaptation Fine-tuning for Pre-trained Large Language Models, "
    "arXiv 2405.00201",
    learning_rate=1e-3,
    cost="16 bytes per trained number; two narrow products each way in the top layers; backward stops below the middle",
)
def spafit(
    *,
    middle: Layers = "1/3:2/3",
    top: Layers = "2/3:",
    r: int = 8,
    alpha: float = 16.0,
    target_modules: str | Sequence[str] = _QUERY_VALUE,
    vectors: str = "biases",
) -> Method:
    """Freeze the lowest layers, train biases in the middle ones, low-rank pairs and biases in the top ones.

    Layers in neither `middle` nor `top` stay frozen. In `top` the matrices of `target_modules` (query and value, or the
    projection that holds them) become W + (alpha / r) B A. Thirds by default; the paper sets the bounds by hand and was
    read in excerpts, so which matrices it gives pairs is assumed. `vectors`: what is trained as biases are.

    When not to use it: as it stands on a model without biases (Llama, SmolLM2), which is an error: `vectors: norms`
    trains the weights of the norms in their place, which is not the paper's method.
    """
    pairs = Tensors(only="weights", target_modules=target_modules, layers=top)
    return Method(
        name="spafit",
        parts=(
            Part(select=Tensors(only=vectors, layers=middle), update=InPlace()),
            Part(select=Tensors(only=vectors, layers=top), update=InPlace()),
            Part(select=pairs, update=LowRank(r=r, alpha=alpha)),
        ),
    )
