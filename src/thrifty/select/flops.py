"""What backward costs, tensor by tensor, in the order in which it passes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import ThriftyError

__all__ = ["Link", "backward_chain", "chain_flops"]


@dataclass(frozen=True, kw_only=True)
class Link:
    """One tensor on backward's way from the loss to the input. `weight_flops`: its own gradient; `pass_flops`: passing
    the activations' gradient through its module; both for each token. Without a name it can only be passed."""

    name: str | None
    weight_flops: float
    pass_flops: float


def chain_flops(chain: Sequence[Link], chosen: set[str]) -> float:
    """FLOPs of backward for each token where the tensors `chosen` are trained: their own gradients, and the passing of
    all that lies before the deepest of them."""
    deepest = max((i for i, link in enumerate(chain) if link.name in chosen), default=0)
    own = sum(link.weight_flops for link in chain if link.name in chosen)
    return own + sum(link.pass_flops for link in chain[:deepest])


def backward_chain(model: nn.Module) -> tuple[Link, ...]:
    """The model's tensors from the output to the input, seen in one forward on `dummy_inputs` without gradients.

    Counted are products with weights; those between activations (attention scores) depend on the length and are left
    out. A tensor read in several places has its own gradient at the deepest. ThriftyError where there are no
    `dummy_inputs`.
    """
    names = {id(p): name for name, p in model.named_parameters() if p.is_floating_point() and p.numel()}
    left: dict[int, list[float]] = {}  # parameter -> weight FLOPs of its readers that are still to come
    calls = list(dict.fromkeys(_calls(model)))
    readers = [(module, p) for module in reversed(calls) for p in module.parameters(recurse=False) if id(p) in names]
    for module, p in readers:
        left.setdefault(id(p), []).append(_flops(model, module, p)[0])
    chain, sums = [], {key: sum(values) for key, values in left.items()}
    for module, p in readers:
        left[id(p)].pop()
        deepest = not left[id(p)]
        chain.append(
            Link(
                name=names[id(p)] if deepest else None,
                weight_flops=sums[id(p)] if deepest else 0.0,
                pass_flops=_flops(model, module, p)[1],
            )
        )
    return tuple(chain)


def _calls(model: nn.Module) -> list[nn.Module]:
    """Modules in the order in which a forward reaches them."""
    batch = getattr(model, "dummy_inputs", None)
    if batch is None:
        raise ThriftyError(
            f"the order of backward is seen in a forward on dummy_inputs, which {type(model).__name__} does not have: "
            "take another method, such as lisa"
        )
    device, seen = next(model.parameters()).device, list[nn.Module]()
    training = [module for module in model.modules() if module.training]
    hooks = [m.register_forward_pre_hook(lambda m, _: seen.append(m)) for m in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return seen


def _flops(model: nn.Module, module: nn.Module, parameter: Tensor) -> tuple[float, float]:
    """Of one tensor's own gradient and of passing through it, for each token."""
    size = float(parameter.numel())
    if isinstance(module, nn.Embedding):
        return float(parameter.shape[-1]), 0.0
    if parameter.ndim == 3:  # stacked experts, of which a token sees a few
        config = getattr(model, "config", None)
        size *= min(1.0, getattr(config, "num_experts_per_tok", parameter.shape[0]) / parameter.shape[0])
    if parameter.ndim == 1 and isinstance(module, nn.Linear | Conv1D):  # a bias: a sum over tokens
        return size, 0.0
    return 2 * size, 2 * size
