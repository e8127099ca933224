"""From one plan to the next: what surviving numbers keep, in their leaves and in the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ..core.errors import ThriftyError
from ..core.region import Region
from .part import Part

__all__ = ["Leaf", "carry_leaf", "held", "leaves_of", "swap"]


@dataclass(frozen=True)
class Leaf:
    """A leaf as it was under the plan before: of which region, `shape` that of the whole tensor."""

    region: Region
    leaf: nn.Parameter
    shape: tuple[int, ...]
    in_leaf: bool
    stamp: int


def leaves_of(parts: Mapping[str, Part]) -> dict[str, Leaf]:
    """Taken before the parts go."""
    return {
        name: Leaf(part.region, part.leaf, tuple(part.weight.shape), part.in_leaf, part.stamp)
        for name, part in parts.items()
    }


def _moved(values: Tensor, old: Leaf, new: Part) -> Tensor:
    """Packed `values` of the old region as packed values of the new one, zero where they have none."""
    dense = torch.zeros(old.shape, dtype=values.dtype, device=values.device)
    old.region.scatter_(dense, values)
    return new.region.gather(dense)


@torch.no_grad()
def carry_leaf(old: Leaf, new: Part) -> None:
    """Surviving numbers keep their float32 offsets to the bit; the others keep what `new` holds."""
    if old.in_leaf or new.in_leaf:
        return  # the weight itself holds the values
    if old.region == new.region:
        new.leaf.copy_(old.leaf)
        return
    stays = _moved(torch.ones_like(old.leaf, dtype=torch.bool), old, new).view_as(new.leaf)
    new.leaf.copy_(torch.where(stays, _moved(old.leaf.detach(), old, new).view_as(new.leaf), new.leaf))


def held(optimizer: Optimizer, leaves: Iterable[nn.Parameter]) -> bool:
    """Does `optimizer` step these leaves? ThriftyError where it steps only some of them."""
    inside = {id(p) for group in optimizer.param_groups for p in group["params"]}
    ours = [id(leaf) in inside for leaf in leaves]
    if any(ours) and not all(ours):
        raise ThriftyError(
            f"the optimizer holds {sum(ours)} of {len(ours)} leaves: a method with a schedule needs all of "
            "tuning.parameters() in one optimizer"
        )
    return any(ours)


def swap(optimizer: Optimizer, old: Mapping[str, Leaf], new: Mapping[str, Part], *, carry: bool) -> None:
    """Put the new leaves into the optimizer's groups in place of the old ones; the state of what left is freed.

    A tensor stays in its group; one that is new joins the first group that holds tensors like it (matrices, vectors),
    else the first of all. With `carry`, state of the leaf's own size (moments) follows each surviving number and new
    numbers start at zero; a step count follows its tensor. State of another size (Adafactor's factors) starts anew
    where the region changed.
    """
    if not held(optimizer, [was.leaf for was in old.values()]):
        raise ThriftyError("this optimizer holds none of the leaves: give the one made of tuning.parameters()")
    groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    group_of = {name: groups[id(was.leaf)] for name, was in old.items()}
    of_kind: dict[bool, int] = {}
    for name, was in old.items():
        of_kind.setdefault(len(was.shape) > 1, group_of[name])
    states = {name: optimizer.state.pop(was.leaf, {}) for name, was in old.items()}
    leaving = {id(was.leaf) for was in old.values()}
    members: list[list[Any]] = [
        [p for p in group["params"] if id(p) not in leaving] for group in optimizer.param_groups
    ]
    for name, part in new.items():
        like = of_kind.get(part.weight.ndim > 1, min(group_of.values()))
        members[group_of.get(name, like)].append(part.leaf)
        if carry and states.get(name):
            state = _carried(states[name], old[name], part)
            if state:
                optimizer.state[part.leaf] = state
    for group, params in zip(optimizer.param_groups, members, strict=True):
        group["params"] = params


def _carried(state: Mapping[str, Any], old: Leaf, new: Part) -> dict[str, Any]:
    if old.region == new.region:
        return dict(state)
    if not bool(_moved(torch.ones_like(old.leaf, dtype=torch.bool), old, new).any()):
        return {}
    size = old.leaf.numel()
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim > 0}
    if any(value.numel() != size for value in tensors.values()):
        return {}
    return {**state, **{key: _moved(value, old, new).view_as(new.leaf) for key, value in tensors.items()}}
