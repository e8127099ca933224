"""The trunk and the head of a causal language model, found by looking, and the head's logits without the trunk.

Names: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["evaluation_mode", "head_name", "is_plain", "own_logits", "trunk_names", "unwrapped"]


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The model whose forward makes the loss: inside a PEFT wrapper the wrapped one, otherwise the model itself."""
    inner: PreTrainedModel = getattr(model, "get_base_model", lambda: model)()
    return inner


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, no module is in training mode (no dropout); each module's own mode is put back after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def head_name(model: PreTrainedModel) -> str | None:
    """The dotted name of the module that `get_output_embeddings` returns, or None."""
    return _name_of(model, model.get_output_embeddings())


def trunk_names(model: PreTrainedModel) -> list[str]:
    """Dotted names of the modules that may turn token ids into the head's hidden states, likeliest first."""
    found = [_name_of(model, module) for module in (model.base_model, model.get_decoder())]
    names = [*found, "model", "model.decoder", "transformer"]
    modules = dict(model.named_modules())
    return list(dict.fromkeys(name for name in names if name and name in modules))


def _name_of(model: nn.Module, wanted: Any) -> str | None:
    # The root's own name is empty: it is nobody's trunk.
    return next((name for name, module in model.named_modules() if module is wanted), None) or None


def is_plain(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling `head` is exactly `F.linear(x, head.weight, head.bias)`: no adapter, hook or replaced forward."""
    return (
        type(head).forward is nn.Linear.forward
        and "forward" not in head.__dict__
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
    )


def own_logits(forward: Callable[..., Any], trunk: nn.Module, output: type, hidden_TD: Tensor) -> Tensor:
    """Logits `[T, V]` for given hidden states, with everything that a model's own `forward` does to its head's output.

    `forward` runs with `trunk` stubbed: in its place an `output` that holds `hidden_TD` is returned. RuntimeError where
    `forward` does not call `trunk`.
    """

    stubbed = False

    def stub(*_: Any, **__: Any) -> Any:
        nonlocal stubbed
        stubbed = True
        return output(last_hidden_state=hidden_TD.unsqueeze(0))

    ids_1T = torch.zeros(1, hidden_TD.shape[0], dtype=torch.long, device=hidden_TD.device)
    with _replaced_forward(trunk, stub):
        logits_1TV: Tensor = forward(input_ids=ids_1T, use_cache=False).logits
    if not stubbed:
        raise RuntimeError(f"the model reads its hidden states past {type(trunk).__name__}")
    return logits_1TV.squeeze(0)


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before
