"""One training step of each contender, in a loop of its own: the method's cost without a trainer around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from thrifty.objective.next_token import install, loss_of
from thrifty.objective.proof import prepare
from thrifty.run.memory import MemoryMeter, saved_bytes
from thrifty.select.probe import run_probe
from thrifty.select.targets import targets
from thrifty.update.tuning import attach_with

from .models import build

__all__ = ["StepContender", "linear_numbers", "step_contender"]

_LEARNING_RATE = 1e-4


def linear_numbers(model: nn.Module) -> int:
    """How many numbers all linear layers but the head hold: what "1 %" is a share of."""
    sizes = dict(model.named_parameters())
    return sum(sizes[name].numel() for name in targets(model, "all-linear"))


def make_batch(model: PreTrainedModel, *, rows: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Random rows of full length; the second half of each is labelled, as an answer would be."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens), generator=generator)
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class StepContender:
    """A model, a way to train it, and `step()`: gradients cleared, forward, backward, optimizer."""

    def __init__(self, model: nn.Module, leaves: Sequence[nn.Parameter], batch: Mapping[str, Tensor]) -> None:
        self.model, self.leaves, self.batch = model, list(leaves), batch
        self.meter: MemoryMeter | None = None
        self.optimizer = torch.optim.AdamW(self.leaves, lr=_LEARNING_RATE, fused=True) if self.leaves else None
        self.tuned: frozenset[nn.Module] = frozenset()

    def step(self) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        loss_of(self.model, self.batch).backward()
        if self.optimizer is not None:
            self.optimizer.step()

    def steps(self, number: int) -> None:
        """`number` of them."""
        for _ in range(number):
            self.step()

    def wake(self) -> None:
        """Read every weight once: one short row forward."""
        with torch.no_grad():
            loss_of(self.model, {name: rows[:1, -16:] for name, rows in self.batch.items()})

    def record(self) -> dict[str, Any]:
        """Bytes and counts, after some steps."""
        assert self.meter is not None
        peak = self.meter.peak()
        with saved_bytes(self.model, lambda module: module in self.tuned) as saved:
            loss = loss_of(self.model, self.batch)
        loss.backward()
        gradients = [p.grad for p in self.leaves if p.grad is not None]
        states = [
            value
            for state in (self.optimizer.state.values() if self.optimizer else ())
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        return {
            "trained": sum(p.numel() for p in self.leaves),
            "peak_bytes": peak,
            "saved_bytes": saved.total,
            "saved_by_tuned_bytes": saved.within,
            "gradient_bytes": sum(g.nbytes for g in gradients),
            "optimizer_bytes": sum(v.nbytes for v in states),
        }


class _Inference(StepContender):
    def step(self) -> None:
        with torch.no_grad():
            loss_of(self.model, self.batch)

    def record(self) -> dict[str, Any]:
        assert self.meter is not None
        return {"peak_bytes": self.meter.peak()}


class _Probe(_Inference):
    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor], *, block: int) -> None:
        super().__init__(model, [], batch)
        self.grids = dict.fromkeys(targets(model, "all-linear"), (block, block))

    def step(self) -> None:
        self.steps(1)

    def steps(self, number: int) -> None:
        """One probe of as many batches."""
        run_probe(self.model, [self.batch] * number, grids=self.grids, statistics=["abs_grad"], loss=loss_of)


def step_contender(spec: Mapping[str, Any]) -> StepContender:
    """What `spec` describes: `shape`, `rows`, `tokens`, and `kind`: floor, inference, full, probe, or a `method`."""
    model = build(spec["shape"])
    batch = make_batch(model, rows=spec["rows"], tokens=spec["tokens"])
    if spec.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    first_row = {name: rows[:1] for name, rows in batch.items()}
    install(model, prepare(model, sample_batch=first_row))
    meter = MemoryMeter(model)
    contender = _KINDS[spec["kind"]](model, batch, spec)
    contender.meter = meter
    if spec.get("compiled"):
        model.base_model.compile()  # the trunk; the loss looks at the labels and stays eager
    return contender


def _floor(model: PreTrainedModel, batch: Mapping[str, Tensor], spec: Mapping[str, Any]) -> StepContender:
    model.requires_grad_(False)
    model.enable_input_require_grads()  # so that the lowest layer's input is differentiated
    return StepContender(model, [], batch)


def _full(model: PreTrainedModel, batch: Mapping[str, Tensor], spec: Mapping[str, Any]) -> StepContender:
    return StepContender(model, list(model.parameters()), batch)


def _inference(model: PreTrainedModel, batch: Mapping[str, Tensor], spec: Mapping[str, Any]) -> StepContender:
    return _Inference(model, [], batch)


def _probe(model: PreTrainedModel, batch: Mapping[str, Tensor], spec: Mapping[str, Any]) -> StepContender:
    return _Probe(model, batch, block=64)


def _method(model: PreTrainedModel, batch: Mapping[str, Tensor], spec: Mapping[str, Any]) -> StepContender:
    """A thrifty method at a share of the linear layers' numbers, or PEFT's own as its users make it."""
    names = list(targets(model, "all-linear"))
    budget = None if spec.get("share") is None else int(spec["share"] * linear_numbers(model))
    tuning = attach_with(model, spec["method"], budget=budget, batches=[batch], seed=0, loss=loss_of)
    contender = StepContender(tuning.model, tuning.parameters(), batch)
    contender.tuned = frozenset(model.get_submodule(name.removesuffix(".weight")) for name in names)
    return contender


_KINDS: dict[str, Callable[[PreTrainedModel, Mapping[str, Tensor], Mapping[str, Any]], StepContender]] = {
    "floor": _floor,
    "full": _full,
    "inference": _inference,
    "probe": _probe,
    "method": _method,
}
