"""Less memory for a pass through the model: some layers keep only their input and run once more in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = ["recompute_first", "recomputed_layers"]

_EVERY = 2  # half of the activations for a sixth more time: forward is a third of forward and backward
_OWN = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")  # what is set on a layer


def recompute_first(model: nn.Module, number: int) -> None:
    """Where all layers of `model` are computed again in backward: only the lowest `number`.

    Those above free what they keep before the lowest run again, so that each one left out costs what it keeps and no
    more; whatever the number, losses and gradients are the same.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[number:]:
        layer.gradient_checkpointing = False


@contextmanager
def recomputed_layers(model: nn.Module) -> Iterator[list[nn.Module]]:
    """While open, every second of transformers' layers is recomputed in backward; each where any is in training.

    For a model in eval mode, whose layers never do so by themselves. A layer that is recomputed must not write into a
    cache, so there is none. Gives the layers that were chosen: none where a model is not made of such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    chosen = layers if any(layer.gradient_checkpointing for layer in layers) else layers[::_EVERY]
    config: Any = getattr(model, "config", None)
    texts: Any = getattr(config, "get_text_config", lambda: None)()  # a model of several modalities has one apart
    configs = [c for c in (config, texts) if hasattr(c, "use_cache")]
    caches = [c.use_cache for c in configs]
    before = [{key: layer.__dict__[key] for key in _OWN if key in layer.__dict__} for layer in chosen]
    try:
        for c in configs:
            c.use_cache = False
        for layer in chosen:
            # the flag of the layer alone, which its own wrapper asks for; `_in_eval` takes it back for what it computes
            layer.training = layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = _in_eval(layer)
        yield list(chosen)
    finally:
        for c, used in zip(configs, caches, strict=True):
            c.use_cache = used
        for layer, attributes in zip(chosen, before, strict=True):
            for key in _OWN:
                layer.__dict__.pop(key, None)
            layer.__dict__.update(attributes)


def _in_eval(layer: nn.Module) -> Callable[..., Any]:
    """What transformers calls with a layer's forward and its positional inputs."""

    def recompute(forward: Callable[..., Any], *args: Tensor) -> Any:
        def run(*inputs: Tensor) -> Any:
            layer.training = False
            try:
                return forward(*inputs)
            finally:
                layer.training = True

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)

    return recompute
