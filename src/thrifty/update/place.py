"""Putting parts in place on a model, and taking them off again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.entries import Entries
from ..core.errors import ThriftyError
from ..core.low_rank import LowRank
from ..core.plan import Plan
from ..core.projected import Projected
from ..core.quantized import QuantizedLinear
from ..core.region import Blocks, Region
from ..core.rotated import Rotated
from .base import Originals
from .general import seeing_class
from .linear import InPlaceConv1D, InPlaceLinear, LinearPart
from .low_rank import LowRankConv1D, LowRankLinear, LowRankPart
from .part import LEAF_PREFIX, InPlaceModule, Part
from .projected import ProjectedPart
from .quantized import QuantizedPart, check_regions
from .rotated import RotatedPart

__all__ = ["place", "take_off"]

_LINEAR: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: InPlaceLinear, Conv1D: InPlaceConv1D}
_LOW_RANK: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: LowRankLinear, Conv1D: LowRankConv1D}


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
        and isinstance(region, Blocks | Entries | LowRank | Projected)
    )


def place(model: nn.Module, plan: Plan, *, keep_originals: bool, seed: int = 0) -> dict[str, Part]:
    """Freeze everything, put a part on each planned parameter; name -> part, in the plan's order. `seed`: of the random
    factors of low-rank pairs."""
    parameters = dict(model.named_parameters())
    holders = {name: _holders(model, parameters[name]) for name in plan}
    for name, region in plan.items():
        if isinstance(region, LowRank | Projected) and not _read_alone(model, holders[name], region):
            what = "low-rank pair" if isinstance(region, LowRank) else "core"
            raise ThriftyError(
                f"{name} cannot take a {what}: it is not the weight of a plain linear layer that nothing else "
                "reads (embeddings, tied weights and the output head are not); leave it out"
            )
    check_regions(model, plan)
    quantized = {n for n in plan if isinstance(holders[n][0][0], QuantizedLinear) and holders[n][0][1] == "weight"}
    originals: Originals | dict[str, Tensor] = Originals(model) if quantized else {}
    generator = torch.Generator().manual_seed(seed)
    for p in parameters.values():
        p.requires_grad_(False)
    parts: dict[str, Part] = {}
    general: dict[nn.Module, dict[str, Part]] = {}
    for name, region in plan.items():
        module, key = holders[name][0]
        if name in quantized:
            assert isinstance(module, QuantizedLinear)
            assert isinstance(region, Blocks)
            parts[name] = QuantizedPart(module, name=name, region=region, base=originals[name])
            module._thrifty = {key: parts[name]}  # type: ignore[assignment]
            continue
        if _read_alone(model, holders[name], region):
            if isinstance(region, LowRank | Projected):
                alone: Part = (
                    LowRankPart(module, name=name, region=region, generator=generator)
                    if isinstance(region, LowRank)
                    else ProjectedPart(module, name=name, region=region)
                )
                module.__class__ = _LOW_RANK[type(module)]
            else:
                assert isinstance(region, Blocks | Entries)
                alone = LinearPart(module, name=name, region=region)
                module.__class__ = _LINEAR[type(module)]
            module._thrifty = {key: alone}  # type: ignore[assignment]
            parts[name] = alone
            continue
        part = (
            RotatedPart(module, key, name=name, region=region)
            if isinstance(region, Rotated)
            else Part(module, key, name=name, region=region, keep_original=keep_originals)
        )
        parts[name] = part
        if not part.in_leaf:
            for holder, attribute in holders[name]:
                general.setdefault(holder, {})[attribute] = part
    for module, seen in general.items():
        module._thrifty = {**getattr(module, "_thrifty", {}), **seen}  # type: ignore[assignment]
        module.__class__ = seeing_class(type(module), tuple(sorted(seen)))
    return parts


def take_off(model: nn.Module, parts: Mapping[str, Part]) -> None:
    """Write the trained values once more and leave plain modules."""
    for part in parts.values():
        part.finish()
    for module in model.modules():
        if isinstance(module, InPlaceModule):
            for key in [k for k in module._parameters if k.startswith(LEAF_PREFIX)]:
                del module._parameters[key]
            del module._thrifty
            plain = next(c for c in type(module).__mro__ if not issubclass(c, InPlaceModule))
            module.__class__ = plain  # type: ignore[assignment]
