"""A plain-autograd twin of an attached model: dense autograd, the region rebuilt into each weight in every forward.

The twin trains leaves of the same shapes from the same zeros, so any optimizer, any trainer and weight decay mean the
same to both; what differs is only who computes the gradient and who writes the weight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from thrifty import attach
from thrifty.core.plan import Plan

__all__ = ["TOLERANCE", "Pair", "effective", "plain_twin", "relative_difference"]

# Of what was trained, relative to the distance travelled, and of the losses, absolute. The float32 figure is what
# rounding leaves after a few AdamW steps; products in bfloat16 may be summed in another order by another CPU.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Offset(nn.Module):
    """`W` with original + offset at `positions` (of the flattened tensor), rounded once to the dtype of `W`."""

    def __init__(self, weight: Tensor, positions: Tensor) -> None:
        super().__init__()
        self.positions = positions
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.offset = nn.Parameter(torch.zeros(positions.shape, dtype=dtype))

    def forward(self, weight: Tensor) -> Tensor:
        flat = weight.reshape(-1)
        trained = (flat[self.positions].to(self.offset.dtype) + self.offset).to(weight.dtype)
        return flat.index_put((self.positions.flatten(),), trained.flatten()).view(weight.shape)


def plain_twin(model: nn.Module, plan: Plan) -> dict[str, nn.Parameter]:
    """Make `model` a twin with parametrizations of plain torch; the offsets by parameter name, in the plan's order."""
    names = {id(p): name for name, p in model.named_parameters()}
    holders: dict[str, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            holders.setdefault(names[id(parameter)], []).append((module, key))
    model.requires_grad_(False)
    offsets = {}
    for name, region in plan.items():
        module, key = holders[name][0]
        weight = getattr(module, key)
        part = Offset(weight, region.gather(torch.arange(weight.numel()).view(weight.shape)))
        offsets[name] = part.offset
        for module, key in holders[name]:  # a tied tensor is rebuilt by each of its readers from the one offset
            parametrize.register_parametrization(module, key, part)
    return offsets


def effective(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The weights as a plain, attached or twin model computes with them; copies."""
    found = {}
    for name in names:
        module, _, key = name.rpartition(".")
        with torch.no_grad():
            found[name] = getattr(model.get_submodule(module), key).detach().clone()
    return found


def relative_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """The distance between two results over the distance travelled from `start`, all tensors together."""
    apart = sum(float((one[n].double() - other[n].double()).square().sum()) for n in start)
    moved = sum(float((other[n].double() - start[n].double()).square().sum()) for n in start)
    assert moved > 0, "the twin did not move"
    return float((apart / moved) ** 0.5)


@dataclass
class Pair:
    """An attached model and its twin, before any step. `base` stays as it is."""

    base: nn.Module
    tuning: Any
    twin: nn.Module
    offsets: dict[str, nn.Parameter]

    @classmethod
    def of(cls, model: nn.Module, method: Any, **options: Any) -> Pair:
        base, twin = copy.deepcopy(model), copy.deepcopy(model)
        tuning = attach(model, method, **options)
        return cls(base, tuning, twin, plain_twin(twin, tuning.plan))

    def difference(self) -> float:
        """How far apart the two have ended: of the weights or of the leaves, whichever is more."""
        plan = self.tuning.plan
        weights = relative_difference(
            effective(self.tuning.model, plan), effective(self.twin, plan), effective(self.base, plan)
        )
        zero = {name: torch.zeros_like(p) for name, p in self.offsets.items()}
        leaves = {name: p.detach() for name, p in self.tuning.named_leaves().items()}
        return max(weights, relative_difference(leaves, {n: p.detach() for n, p in self.offsets.items()}, zero))

    def outside_is_untouched(self) -> bool:
        """Is every number that is not planned still that of the base?"""
        base = dict(self.base.named_parameters())
        for name, now in self.tuning.model.named_parameters():
            if name in base:
                same = now.detach() == base[name]
                if name in self.tuning.plan:
                    same |= self.tuning.plan[name].mask(now.shape)
                if not bool(same.all()):
                    return False
        return True
