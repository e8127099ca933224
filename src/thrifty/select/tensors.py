"""Whole tensors: by module, by layer, by what they are (weights, biases, norms)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..core.budget import Budget
from ..core.errors import ThriftyError, unknown
from ..core.plan import Plan
from ..core.region import Whole
from .fixed import FixedSize
from .layers import Layers, in_layers, layer_of

__all__ = ["ONLY", "Tensors"]

ONLY = ("all", "weights", "biases", "norms")


@dataclass(frozen=True, kw_only=True)
class Tensors(FixedSize):
    """Whole parameters. A budget beside it is only checked.

    target_modules: None for every module, module names or their endings, or a regular expression on the module's name.
    only: `weights` (matrices), `biases`, `norms` (other vectors), or `all`. layers: see `in_layers`; None: everywhere.
    after: with `layers`, also what follows the last layer (the final norm; the head, where it is not tied).
    """

    target_modules: str | Sequence[str] | None = None
    only: str = "all"
    layers: Layers = None
    after: bool = False

    def __post_init__(self) -> None:
        if self.only not in ONLY:
            raise ThriftyError(unknown("only", str(self.only), ONLY))

    def select(self, model: nn.Module, *, probe: object, budget: Budget | None, seed: int) -> Plan:
        parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point() and p.numel()}
        inside = in_layers(parameters, self.layers) | (_after_layers(parameters) if self.after else set())
        found = self._modules(model, parameters) & inside
        found = {name for name in found if self.only == "all" or _sort(name, parameters[name].ndim) == self.only}
        if not found:
            asked = {"target_modules": self.target_modules, "only": self.only, "layers": self.layers}
            text = ", ".join(f"{key} {value!r}" for key, value in asked.items() if value not in (None, "all"))
            none = self.only == "biases" and not any(_sort(n, p.ndim) == "biases" for n, p in parameters.items())
            raise ThriftyError(
                f"{type(model).__name__} has no tensor with {text}: choose more modules or layers, or leave 'only' out"
                + ("; it has no biases at all, but norms" if none else "")
            )
        return Plan.of(model, {name: Whole() for name in parameters if name in found})

    def _modules(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> set[str]:
        if self.target_modules is None:
            return set(parameters)
        modules = [name for name, _ in model.named_modules() if name]
        if isinstance(self.target_modules, str):
            try:
                pattern = re.compile(self.target_modules)
            except re.error as error:
                raise ThriftyError(
                    f"target_modules: {self.target_modules!r} is no regular expression ({error})"
                ) from None
            chosen = [name for name in modules if pattern.fullmatch(name)]
            missing = [] if chosen else [self.target_modules]
        else:
            if not isinstance(self.target_modules, Sequence) or not all(
                isinstance(m, str) for m in self.target_modules
            ):
                raise ThriftyError(
                    f"target_modules: {self.target_modules!r} is not valid: give a list of module names such as "
                    "[q_proj, v_proj], or a regular expression"
                )
            hits = {w: [m for m in modules if m == w or m.endswith(f".{w}")] for w in self.target_modules}
            chosen = [name for matching in hits.values() for name in matching]
            missing = [wanted for wanted, matching in hits.items() if not matching]
        if missing:
            endings = {name.rsplit(".", 1)[-1] for name in modules}
            raise ThriftyError(f"target_modules: {unknown('module', missing[0], endings)}")
        canonical = {id(p): name for name, p in parameters.items()}
        aliases = model.named_parameters(remove_duplicate=False)  # a tied tensor goes by each of its names
        under = [(alias, canonical[id(p)]) for alias, p in aliases if id(p) in canonical]
        return {name for alias, name in under if any(alias.startswith(f"{module}.") for module in chosen)}


def _after_layers(names: Iterable[str]) -> set[str]:
    """Those that come after the last of the layers, in the model's order."""
    names = list(names)
    last = max((i for i, name in enumerate(names) if layer_of(name) is not None), default=len(names))
    return set(names[last + 1 :])


def _sort(name: str, dimensions: int) -> str:
    if name.rsplit(".", 1)[-1].endswith("bias"):  # those of stacked experts are matrices
        return "biases"
    return "weights" if dimensions > 1 else "norms"
