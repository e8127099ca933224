"""Which matrices read the same input, seen while the model runs: what backward keeps of an input is kept once for all.

Only linear layers that keep no more of their input than their blocks use have one here. Stacked experts, tied weights
and the output head keep all of theirs whatever is chosen (their gradient is taken dense): they are in no group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.pytorch_utils import Conv1D

from ..core.errors import ThriftyError
from ..core.plan import Plan
from ..core.region import Blocks
from .targets import Target

__all__ = ["Input", "kept_inputs", "same_inputs", "strip_linears", "watch_inputs"]


@dataclass(frozen=True)
class Input:
    """The matrices that read one input `[..., columns]`, in the model's order."""

    matrices: tuple[Target, ...]

    @property
    def columns(self) -> int:
        return self.matrices[0].out_in[1]


def strip_linears(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[nn.Module, Target]]:
    """Those of the parameters `names` that only one linear layer holds, with that layer; in the model's order."""
    wanted, head = set(names), getattr(model, "get_output_embeddings", lambda: None)()
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, p in module.named_parameters(recurse=False):
            holders.setdefault(id(p), []).append((module, key))
    found = {}
    for name, p in model.named_parameters():
        (module, key), *others = holders[id(p)]
        plain = isinstance(module, nn.Linear | Conv1D) and key == "weight" and not others and module is not head
        if name in wanted and plain:
            found[name] = module, Target(name, tuple(p.shape), transposed=isinstance(module, Conv1D))
    return found


@contextmanager
def watch_inputs(model: nn.Module, names: Iterable[str]) -> Iterator[Callable[[], tuple[Input, ...]]]:
    """While open, forwards are watched; the function it gives returns what was seen, a layer that never ran alone.

    Same input: the same tensor object, unmodified in between. Tensors are held weakly, never by `id` (reused).
    """
    linears = strip_linears(model, names)
    first: dict[str, str] = {name: name for name in linears}  # towards the first name of the group
    seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def root(name: str) -> str:
        while first[name] != name:
            name = first[name]
        return name

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            version, reader = seen.get(x, (None, name))
            if version == x._version:
                first[root(name)] = root(reader)
            else:
                seen[x] = x._version, name

        return hook

    def groups() -> tuple[Input, ...]:
        found: dict[str, list[Target]] = {}
        for name, (_, target) in linears.items():
            found.setdefault(root(name), []).append(target)
        return tuple(Input(tuple(matrices)) for matrices in found.values())

    hooks = [m.register_forward_pre_hook(watch(name), with_kwargs=True) for name, (m, _) in linears.items()]
    try:
        yield groups
    finally:
        for hook in hooks:
            hook.remove()


def same_inputs(model: nn.Module, names: Iterable[str], *, batch: Mapping[str, Any] | None = None) -> tuple[Input, ...]:
    """The inputs of the linear layers among the parameters `names`, by one forward without gradients.

    batch: keyword arguments of the model, else its own `dummy_inputs`. ThriftyError where it has none.
    """
    batch = getattr(model, "dummy_inputs", None) if batch is None else batch
    if batch is None:
        raise ThriftyError(
            f"input_budget without a probe needs a model with dummy_inputs, {type(model).__name__} has none: "
            "remove input_budget, or take smt, which looks at batches"
        )
    device, training = next(model.parameters()).device, [module for module in model.modules() if module.training]
    try:
        model.eval()
        with watch_inputs(model, names) as groups, torch.no_grad():
            model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    finally:
        for module in training:
            module.training = True
    return groups()


def kept_inputs(plan: Plan, inputs: Sequence[Input]) -> tuple[int, int]:
    """How many distinct columns of `inputs` backward keeps under `plan`, and of how many.

    Times tokens and the bytes of a number, the first is what the tuned linears keep for backward.
    """
    kept = 0
    for group in inputs:
        used = torch.zeros(group.columns, dtype=torch.bool)
        for target in group.matrices:
            region = plan.get(target.name)
            if isinstance(region, Blocks):
                axis = 0 if target.transposed else 1
                starts = region.index[:, axis].unique() * region.shape[axis]
                columns = (starts[:, None] + torch.arange(region.shape[axis])).flatten()
                used[columns[columns < group.columns]] = True
            elif region is not None:
                used[:] = True
        kept += int(used.sum())
    return kept, sum(group.columns for group in inputs)
