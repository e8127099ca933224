"""Candidates: the matrices in which a selector may choose, found by walking any model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import ThriftyError, unknown
from ..core.quantized import QuantizedLinear
from .layers import Layers, in_layers

__all__ = ["Target", "targets"]

_ADVICE = "target_modules takes 'all-linear', a list of module names such as [q_proj, v_proj], or a regular expression"


@dataclass(frozen=True)
class Target:
    """A matrix `[out, in]`, a GPT-2 `Conv1D` weight `[in, out]` (`transposed`), or stacked experts `[experts, out,
    in]`."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def out_in(self) -> tuple[int, int]:
        """Outputs and inputs of the matrix (of one expert)."""
        rows, columns = self.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)


def _embeddings(model: nn.Module) -> set[int]:
    """Input and output embeddings: not among the linear layers, whatever their class; chosen only by name."""
    found: set[int] = set()
    for getter in ("get_output_embeddings", "get_input_embeddings"):
        try:
            module = getattr(model, getter, lambda: None)()
        except NotImplementedError:
            module = None
        if module is not None:
            found |= {id(p) for p in module.parameters()}
    return found


def _by_module(model: nn.Module, *, embeddings: bool) -> dict[str, Target]:
    """Name of a module (or of a stacked parameter) -> what could be trained there; a tied tensor under each of its
    names."""
    left_out = set() if embeddings else _embeddings(model)
    # position tables are embeddings too, though no getter returns them
    linears = (nn.Linear, Conv1D, QuantizedLinear)
    classes = (*linears, nn.Embedding) if embeddings else linears
    canonical = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Target] = {}
    for module_name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            name = canonical[id(parameter)]
            if id(parameter) in left_out or not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            matrix = type(module) in classes and key == "weight" and parameter.ndim == 2
            if matrix or parameter.ndim == 3:
                alias = module_name if key == "weight" else f"{module_name}.{key}"
                found[alias] = Target(name, tuple(parameter.shape), transposed=type(module) is Conv1D)
    return found


def targets(model: nn.Module, target_modules: str | Sequence[str], *, layers: Layers = None) -> Mapping[str, Target]:
    """Candidates by parameter name. A list matches module names or their endings, a string is a regular expression on
    the whole module name; each entry must match something, else ThriftyError with the nearest name. `layers`: only
    those that lie there (`in_layers`)."""
    found = _matching(model, target_modules)
    inside = in_layers(dict(model.named_parameters()), layers)
    chosen = {name: target for name, target in found.items() if name in inside}
    if not chosen:
        raise ThriftyError(f"layers {layers!r} holds none of target_modules {target_modules!r}: choose other layers")
    return chosen


def _matching(model: nn.Module, target_modules: str | Sequence[str]) -> Mapping[str, Target]:
    if target_modules == "all-linear":
        chosen = _by_module(model, embeddings=False)
        if not chosen:
            raise ThriftyError(f"{type(model).__name__} has no linear layer to select in; use method 'full'")
        return {t.name: t for t in chosen.values()}
    every = _by_module(model, embeddings=True)
    endings = {alias.rsplit(".", 1)[-1] for alias in every}
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ThriftyError(
                f"target_modules: {target_modules!r} is no regular expression ({error}); {_ADVICE}"
            ) from None
        hits = {alias: t for alias, t in every.items() if pattern.fullmatch(alias)}
        if not hits:
            raise ThriftyError(f"target_modules: {unknown('module', target_modules, endings)}; {_ADVICE}")
        return {t.name: t for t in hits.values()}
    if (
        not isinstance(target_modules, Sequence)
        or not all(isinstance(m, str) for m in target_modules)
        or not target_modules
    ):
        raise ThriftyError(f"target_modules: {target_modules!r} is not valid; {_ADVICE}")
    named: dict[str, Target] = {}
    for wanted in target_modules:
        matching = {t.name: t for alias, t in every.items() if alias == wanted or alias.endswith(f".{wanted}")}
        if not matching:
            raise ThriftyError(f"target_modules: {unknown('module', wanted, endings)}")
        named |= matching
    return {t.name: t for t in every.values() if t.name in named}
