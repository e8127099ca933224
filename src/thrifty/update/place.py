"""Putting parts in place on a model, and taking them off again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.entries import Entries
from ..core.plan import Plan
from ..core.region import Blocks, Region
from .general import seeing_class
from .linear import InPlaceConv1D, InPlaceLinear, LinearPart
from .part import LEAF_PREFIX, InPlaceModule, Part

__all__ = ["place", "take_off"]

_LINEAR: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: InPlaceLinear, Conv1D: InPlaceConv1D}


def _holders(model: nn.Module, parameter: Tensor) -> list[tuple[nn.Module, str]]:
    return [(m, key) for m in model.modules() for key, p in m._parameters.items() if p is parameter]


def _read_alone(model: nn.Module, holders: list[tuple[nn.Module, str]], region: Region) -> bool:
    """Is this a linear layer's weight that nothing but its own forward reads?"""
    (module, key), *others = holders
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return (
        not others
        and key == "weight"
        and type(module) in _LINEAR
        and module is not head
        and isinstance(region, Blocks | Entries)
    )


def place(model: nn.Module, plan: Plan, *, keep_originals: bool) -> dict[str, Part]:
    """Freeze everything, put a part on each planned parameter; name -> part, in the plan's order."""
    parameters = dict(model.named_parameters())
    holders = {name: _holders(model, parameters[name]) for name in plan}
    for p in parameters.values():
        p.requires_grad_(False)
    parts: dict[str, Part] = {}
    general: dict[nn.Module, dict[str, Part]] = {}
    for name, region in plan.items():
        module, key = holders[name][0]
        if _read_alone(model, holders[name], region):
            assert isinstance(region, Blocks | Entries)
            parts[name] = linear = LinearPart(module, name=name, region=region)
            module._thrifty = {key: linear}  # type: ignore[assignment]
            module.__class__ = _LINEAR[type(module)]
            continue
        parts[name] = part = Part(module, key, name=name, region=region, keep_original=keep_originals)
        if not part.in_leaf:
            for holder, attribute in holders[name]:
                general.setdefault(holder, {})[attribute] = part
    for module, seen in general.items():
        module._thrifty = seen  # type: ignore[assignment]
        module.__class__ = seeing_class(type(module), tuple(sorted(seen)))
    return parts


def take_off(model: nn.Module, parts: Mapping[str, Part]) -> None:
    """Write the trained values once more and leave plain modules."""
    for part in parts.values():
        part.write()
        part.disarm()
    for module in model.modules():
        if isinstance(module, InPlaceModule):
            for key in [k for k in module._parameters if k.startswith(LEAF_PREFIX)]:
                del module._parameters[key]
            del module._thrifty
            plain = next(c for c in type(module).__mro__ if not issubclass(c, InPlaceModule))
            module.__class__ = plain  # type: ignore[assignment]
