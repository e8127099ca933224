"""BitFit: bias terms only."""

from __future__ import annotations

from ..core.method import Method, Part
from ..core.registry import method
from ..select.layers import Layers
from ..select.tensors import Tensors
from ..update.in_place import InPlace

__all__ = ["bitfit"]


@method(
    family="control",
    paper="BitFit: Simple Parameter-efficient Fine-tuning for Transformers, arXiv 2106.10199",
    learning_rate=1e-3,
    cost="12 bytes per bias beside the model; backward dy W, no weight gradient",
)
def bitfit(*, layers: Layers = None) -> Method:
    """Train the bias terms of all modules, and nothing else.

    b <- b - lr * AdamW(dL/db), for models that have biases (GPT-2, Qwen2.5's QKV, OPT, BERT). When not to use it: on
    models without biases (Llama, SmolLM2), where there is nothing to train.
    """
    select = Tensors(only="biases", layers=layers)
    return Method(name="bitfit", parts=(Part(select=select, update=InPlace()),))
