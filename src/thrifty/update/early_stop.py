"""Nothing is differentiated below the lowest trained part.

Where activation checkpointing is switched on, transformers makes the embeddings' output require a gradient, which only
the reentrant kind needs: backward would then go through every layer. While a model is attached, its
`enable_input_require_grads` does so for the reentrant kind alone.
"""

from __future__ import annotations

from types import MethodType

from torch import nn
from transformers import PreTrainedModel

__all__ = ["allow_early_stop", "as_before"]

_NAME = "enable_input_require_grads"


def _is_reentrant(model: nn.Module) -> bool:
    """Does a module of `model` checkpoint in the reentrant way, or in one that cannot be read from it?"""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            how = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
            if how.get("use_reentrant") is not False:
                return True
    return False


def _only_if_needed(self: PreTrainedModel) -> None:
    if _is_reentrant(self):
        type(self).enable_input_require_grads(self)


def _transformers(model: nn.Module) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def allow_early_stop(model: nn.Module) -> list[PreTrainedModel]:
    """Take a required gradient off the embeddings' output, and keep it off; returns the modules where it was on."""
    switched_off = []
    for module in _transformers(model):
        if getattr(module, "_require_grads_hooks", None) and not _is_reentrant(module):
            module.disable_input_require_grads()
            switched_off.append(module)
        setattr(module, _NAME, MethodType(_only_if_needed, module))
    return switched_off


def as_before(model: nn.Module, switched_off: list[PreTrainedModel]) -> None:
    """Undo `allow_early_stop`, whose result is `switched_off`."""
    for module in _transformers(model):
        module.__dict__.pop(_NAME, None)
    for module in switched_off:
        module.enable_input_require_grads()
