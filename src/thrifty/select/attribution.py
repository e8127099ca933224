"""How much each output of a matrix adds to the answer's logit: integrated gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ThriftyError

__all__ = ["ATTRIBUTIONS", "STEPS", "attribute"]

ATTRIBUTIONS = ("attribution", "joint_attribution")  # each matrix's path alone; all matrices on one path
STEPS = 7

_Hook = Callable[[str, Tensor], Tensor]


def attribute(
    model: nn.Module, unit: Mapping[str, Tensor], names: Sequence[str], *, joint: bool, steps: int = STEPS
) -> dict[str, Tensor]:
    """By parameter of `names`, float32 `[rows with a label, outputs]` on the CPU.

    The answer of a row is its last label y, at position t; v is the output at t - 1 of the module that holds the
    matrix, and P(v) the logit of y. Attribution of output i: `v_i / m * sum over k of dP(k v / m) / dv_i`, m = `steps`,
    so the baseline is zero. Only v is scaled, what other positions read stays. joint: all matrices are scaled by the
    same k / m at once: m forwards and backwards in all, not m for each matrix.
    """
    inputs, index, answers = _answers(unit)
    if not len(answers):
        return {}
    clean: dict[str, Tensor] = {}
    model_logits = _Logits(model, inputs, index, answers)

    def note(name: str, flat: Tensor) -> Tensor:
        clean[name] = flat[model_logits.places(flat, name)].detach().clone()
        return flat

    with torch.no_grad():
        model_logits(names, note)
    missing = [name for name in names if name not in clean]
    if missing:
        raise ThriftyError(f"{missing[0]} is read past its module, so its outputs cannot be seen: leave it out")
    totals = {name: torch.zeros_like(v, dtype=torch.float32) for name, v in clean.items()}
    for group in [names] if joint else [[name] for name in names]:
        for step in range(1, steps + 1):
            points = {name: (clean[name] * (step / steps)).requires_grad_() for name in group}

            def put(name: str, flat: Tensor, points: Mapping[str, Tensor] = points) -> Tensor:
                return flat.index_copy(0, model_logits.places(flat, name), points[name])

            logits = model_logits(group, put)
            for name, gradient in zip(group, torch.autograd.grad(logits.sum(), [*points.values()]), strict=True):
                totals[name] += gradient
    return {name: (clean[name].float() * total / steps).cpu() for name, total in totals.items()}


def _answers(unit: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The rows that have an answer, without labels; the position `[rows]` before each last label; that label."""
    labels = unit["labels"].clone()
    labels[:, 0] = -100  # nothing predicts the first
    rows = (labels != -100).any(1)
    positions = torch.arange(labels.shape[1], device=labels.device)
    last = torch.where(labels != -100, positions, 0).amax(1)[rows]
    inputs = {name: value[rows] for name, value in unit.items() if name != "labels"}
    return inputs, last - 1, labels[rows].gather(1, last[:, None])[:, 0]


class _Logits:
    """The answers' logits `[rows]`, with the outputs of some modules changed on the way."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor], index: Tensor, answers: Tensor) -> None:
        self.model, self.inputs, self.index, self.answers = model, inputs, index, answers
        self.rows = torch.arange(len(index), device=index.device)
        self.length = inputs["input_ids"].shape[1]

    def places(self, flat: Tensor, name: str) -> Tensor:
        """Where the answers' positions are in outputs `[rows * length, outputs]`."""
        if len(flat) != len(self.rows) * self.length:
            raise ThriftyError(f"{name} does not put out one vector for each token: leave it out of target_modules")
        return self.rows * self.length + self.index

    def __call__(self, names: Sequence[str], change: _Hook) -> Tensor:
        with _outputs(self.model, names, change), _head_at(self.model, self.index):
            logits = self.model(**self.inputs).logits
        if logits.ndim != 3:
            raise ThriftyError("attribution needs a language model, with one logit for each token of the vocabulary")
        at = self.index if logits.shape[1] == self.length > 1 else torch.zeros_like(self.index)
        return logits[self.rows, at].gather(1, self.answers[:, None])[:, 0].float()


@contextmanager
def _outputs(model: nn.Module, names: Sequence[str], change: _Hook) -> Iterator[None]:
    """While open, `change` sees and replaces the outputs of the modules that hold `names`, as `[tokens, outputs]`."""

    def hook_of(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            return change(name, out.reshape(-1, out.shape[-1])).view(out.shape)

        return hook

    hooks = [model.get_submodule(n.rpartition(".")[0]).register_forward_hook(hook_of(n)) for n in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _head_at(model: nn.Module, index: Tensor) -> Iterator[None]:
    """While open, the head reads position `index` of each row only: logits `[rows, 1, vocabulary]`."""
    head = getattr(model, "get_output_embeddings", lambda: None)()

    def narrow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][torch.arange(len(index), device=index.device), index][:, None], *args[1:])

    hooks = [] if head is None else [head.register_forward_pre_hook(narrow)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
