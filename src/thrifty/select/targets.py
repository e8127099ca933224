"""Candidates: the matrices in which a selector may choose, found by walking any model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import ThriftyError, unknown

__all__ = ["Target", "targets"]

_ADVICE = "target_modules takes 'all-linear', a list of module names such as [q_proj, v_proj], or a regular expression"


@dataclass(frozen=True)
class Target:
    """A matrix `[out, in]`, a GPT-2 `Conv1D` weight `[in, out]` (`transposed`), or stacked experts `[experts, out, in]`."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def out_in(self) -> tuple[int, int]:
        """Outputs and inputs of the matrix (of one expert)."""
        rows, columns = self.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)


def _head_parameters(model: nn.Module) -> set[int]:
    """Input and output embeddings: not among the linear layers, whatever their class."""
    found: set[int] = set()
    for getter in ("get_output_embeddings", "get_input_embeddings"):
        try:
            module = getattr(model, getter, lambda: None)()
        except NotImplementedError:
            module = None
        if module is not None:
            found |= {id(p) for p in module.parameters()}
    return found


def _all_targets(model: nn.Module) -> dict[str, Target]:
    heads = _head_parameters(model)
    kept = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Target] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            name = kept.get(id(parameter))
            if name is None or id(parameter) in heads or not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            linear = type(module) in (nn.Linear, Conv1D) and parameter is module.weight
            if (linear and parameter.ndim == 2) or parameter.ndim == 3:
                found[name] = Target(name, tuple(parameter.shape), transposed=type(module) is Conv1D)
    return found


def targets(model: nn.Module, target_modules: str | Sequence[str]) -> Mapping[str, Target]:
    """Candidates by parameter name. A list matches names or their endings, a string is a regular expression on the whole
    module name; each entry must match something, else ThriftyError with the nearest name."""
    every = _all_targets(model)
    if not every:
        raise ThriftyError(f"{type(model).__name__} has no linear layer to select in; use method 'full'")
    if target_modules == "all-linear":
        return every

    def module_of(name: str) -> str:
        return name.removesuffix(".weight")

    endings = {module_of(name).rsplit(".", 1)[-1] for name in every}
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ThriftyError(f"target_modules: {target_modules!r} is no regular expression ({error}); {_ADVICE}") from None
        chosen = {n for n in every if pattern.fullmatch(module_of(n))}
        if not chosen:
            raise ThriftyError(f"target_modules: {unknown('module', target_modules, endings)}; {_ADVICE}")
        return {n: t for n, t in every.items() if n in chosen}
    if not isinstance(target_modules, Sequence) or not all(isinstance(m, str) for m in target_modules):
        raise ThriftyError(f"target_modules: {target_modules!r} is not valid; {_ADVICE}")
    chosen = set()
    for wanted in target_modules:
        hits = {n for n in every if module_of(n) == wanted or module_of(n).endswith(f".{wanted}")}
        if not hits:
            raise ThriftyError(f"target_modules: {unknown('module', wanted, endings)}")
        chosen |= hits
    if not chosen:
        raise ThriftyError(f"target_modules is empty; {_ADVICE}")
    return {n: t for n, t in every.items() if n in chosen}
