"""Each row of a batch with a delta of its own: forward hooks that add what changed, on untouched base weights.

A linear layer gets the additive form (`additive.py`). Any other module that owns a changed tensor, and a linear layer
whose whole weight changed, is computed once more for the rows concerned, with the trained tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..core.errors import ThriftyError
from .additive import Addend
from .held import Held, HeldRegion

__all__ = ["routed"]

_INSTEAD = "use `with deltas.using(name)` for one delta at a time"


@contextmanager
def routed(
    model: nn.Module, requests: Sequence[str | None], changes: Mapping[str, Mapping[int, Held]]
) -> Iterator[None]:
    """Row i of every batch that `model` sees inside is computed with delta `requests[i]`.

    changes: delta -> id of a parameter -> what changed in it. ThriftyError for a module that does not see one row for
    each request, and at the end for one that ought to have been called and was not.
    """
    modules = [*_modules(model, requests, changes)]
    ran: list[bool] = []
    with ExitStack() as hooks:
        for routed_module in modules:
            handle = routed_module.module.register_forward_hook(routed_module, with_kwargs=True, prepend=True)
            hooks.callback(handle.remove)
        hooks.callback(model.register_forward_hook(lambda *_: ran.append(True)).remove)
        yield
    for routed_module in modules:
        if ran and not routed_module.called:
            raise ThriftyError(
                f"route: {routed_module.path} was not called, so its change was left out (its weights are read by "
                f"another module, or this batch needs none): {_INSTEAD}"
            )


def _modules(
    model: nn.Module, requests: Sequence[str | None], changes: Mapping[str, Mapping[int, Held]]
) -> Iterator[_Routed]:
    dense: dict[tuple[str, int], Tensor] = {}  # a trained tensor that several modules read is made once
    changed = {key for change in changes.values() for key in change}
    for path, module in model.named_modules():
        own = {key: p for key, p in module._parameters.items() if p is not None and id(p) in changed}
        if not own:
            continue
        routed_module = _Routed(module, path or "the model", len(requests))
        for name, change in changes.items():
            touched = {key: (p, change[id(p)]) for key, p in own.items() if id(p) in change}
            if not touched:
                continue
            if _additive(module, {key: held for key, (_, held) in touched.items()}):
                step: _Step = _Added.of(module, {key: held for key, (_, held) in touched.items()})
            else:
                _refuse_parents(path, module, changed)
                for _, (p, held) in touched.items():
                    if (name, id(p)) not in dense:
                        dense[name, id(p)] = held.trained(p)
                step = _Replaced({key: dense[name, id(p)] for key, (p, _) in touched.items()})
            rows = [i for i, request in enumerate(requests) if request == name]
            device = next(iter(own.values())).device
            every = len(rows) == len(requests)
            routed_module.steps.append((None if every else torch.tensor(rows, device=device), step))
        yield routed_module


def _additive(module: nn.Module, held: Mapping[str, Held]) -> bool:
    plain = type(module).forward in (nn.Linear.forward, Conv1D.forward)
    return plain and set(held) <= {"weight", "bias"} and not ("weight" in held and held["weight"].whole)


def _refuse_parents(path: str, module: nn.Module, changed: set[int]) -> None:
    if any(id(p) in changed for child in module.children() for p in child.parameters()):
        raise ThriftyError(
            f"route: {path or 'the model'} and modules inside it have changed tensors of their own, and cannot be "
            f"computed row by row: {_INSTEAD}"
        )


@dataclass
class _Routed:
    """The hook of one module: its steps, each with the rows that it concerns (None: all)."""

    module: nn.Module
    path: str
    requests: int
    steps: list[tuple[Tensor | None, _Step]] = field(default_factory=list)
    called: bool = False
    _inside: bool = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._inside:  # a step computes the module again
            return None
        self.called = self._inside = True
        try:
            self._check([*args, *kwargs.values()], output)
            for rows, step in self.steps:
                output = step(module, rows, args, kwargs, output)
        finally:
            self._inside = False
        return output

    def _check(self, inputs: Sequence[Any], output: Any) -> None:
        if not isinstance(output, Tensor) or not all(isinstance(x, Tensor | int | float | str | None) for x in inputs):
            raise ThriftyError(
                f"route: {self.path} does not make one tensor of tensors, and cannot be computed row by row: {_INSTEAD}"
            )
        for x in (*inputs, output):
            if isinstance(x, Tensor) and (x.ndim == 0 or x.shape[0] != self.requests):
                found = x.shape[0] if x.ndim else "no"
                raise ThriftyError(
                    f"route: {self.path} sees {found} rows for {self.requests} requests: each must have one row "
                    f"(no beams or several sequences; position_ids of the batch's shape), else {_INSTEAD}"
                )


_Step = Callable[[nn.Module, Tensor | None, tuple[Any, ...], dict[str, Any], Tensor], Tensor]


def _pick(x: Any, rows: Tensor | None) -> Any:
    return x if rows is None or not isinstance(x, Tensor) else x.index_select(0, rows)


@dataclass(frozen=True)
class _Added:
    """A linear layer: what changed is added to its output."""

    weight: Addend | None
    bias: Tensor | None  # [O]

    @classmethod
    def of(cls, module: nn.Module, held: Mapping[str, Held]) -> _Added:
        weight, bias = held.get("weight"), held.get("bias")
        addend = None if weight is None else weight.addend(transposed=isinstance(module, Conv1D))
        assert bias is None or isinstance(bias, HeldRegion)
        return cls(addend, None if bias is None else bias.dense_change())

    def __call__(
        self, module: nn.Module, rows: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        x = _pick(args[0] if args else next(iter(kwargs.values())), rows)
        shape = (*x.shape[:-1], output.shape[-1])
        dy = output.new_zeros(()) if self.weight is None else self.weight(x.reshape(-1, x.shape[-1])).view(shape)
        if self.bias is not None:
            dy = dy + self.bias
        dy = dy.to(output.dtype).expand(shape)
        return output + dy if rows is None else output.index_add(0, rows, dy)


@dataclass(frozen=True)
class _Replaced:
    """Any module: computed once more with `tensors`, attribute -> trained tensor."""

    tensors: Mapping[str, Tensor]

    def __call__(
        self, module: nn.Module, rows: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        picked = tuple(_pick(x, rows) for x in args)
        found = functional_call(module, dict(self.tensors), picked, {key: _pick(x, rows) for key, x in kwargs.items()})
        return found if rows is None else output.index_copy(0, rows, found)
