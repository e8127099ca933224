"""Attaching a method to a model: any loop, any optimizer, from `attach` to `finish`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.budget import Budget
from ..core.errors import ThriftyError
from ..core.method import Method, parse_method
from ..core.plan import Plan
from ..core.quantized import quantized_as
from ..delta import Delta, NewTokens
from ..select.compose import compose
from ..select.probe import Loss, model_loss
from ..select.token_rows import with_token_rows
from .agreement import agreeing
from .base import base_tensors, can_read_base
from .early_stop import allow_early_stop, as_before
from .part import Part
from .peer import NO_NEW_TOKENS, PeerTuning, attach_peer
from .place import place, take_off
from .quantized import check_method, prepared
from .sharded import let_go, whole

__all__ = ["Tuning", "attach", "attach_with", "mark"]

_log = logging.getLogger("thrifty")
_KEEP_SHARE = (
    0.1  # originals of whole float32 tensors are kept below this share of the model, else re-read from the base
)


class Tuning:
    """A model with trainable parts in place. `model` is the object that was attached, `plan` says what is trained."""

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        plan: Plan,
        *,
        seed: int,
        probe_seconds: float,
        new_tokens: NewTokens | None = None,
    ) -> None:
        self.model, self.method, self.plan, self.seed = model, method, plan, seed
        self.probe_seconds, self.new_tokens = probe_seconds, new_tokens
        self._new_rows = {} if new_tokens is None else new_tokens.grown_rows(model)  # which no folder holds
        self._required = {name: p.requires_grad for name, p in model.named_parameters()}
        self._marks: dict[str, Tensor] = {}
        self._parts: dict[str, Part] = {}
        self._place(plan)
        self._input_grads = allow_early_stop(model)

    def _place(self, plan: Plan) -> None:
        self._keep = plan.trainable_share < _KEEP_SHARE or not can_read_base(self.model)
        self.plan, self._parts = plan, place(self.model, plan, keep_originals=self._keep, seed=self.seed)
        for name, part in self._parts.items():
            if part.in_leaf:
                self._marks.setdefault(name, mark(part.leaf))

    def parameters(self) -> list[nn.Parameter]:
        """The trainable leaves, in the plan's order: packed offsets from the original values (float32 `[n, h, w]` for
        blocks), the tensor itself where all of a float32 tensor is trained, or a low-rank pair `[r, in + out]`."""
        return [part.leaf for part in self._live().values()]

    def named_leaves(self) -> dict[str, nn.Parameter]:
        """Parameter name -> its leaf."""
        return {name: part.leaf for name, part in self._live().items()}

    def optimizer(self, *, learning_rate: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        """The optimizer that suits the method, over all leaves: its own, or AdamW."""
        return self.method.optimizer(self.named_leaves(), learning_rate=learning_rate, weight_decay=weight_decay)

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained."""
        return self.plan.trainable_parameters

    @property
    def trainable_share(self) -> float:
        """Trained numbers over the model's distinct parameters."""
        return self.plan.trainable_share

    def _live(self) -> dict[str, Part]:
        if not self._parts:
            raise ThriftyError("this tuning is finished: attach the model again to train it further")
        let_go(self.model)
        return self._parts

    def sync(self) -> None:
        """Write the trained values into the weights now. Needed only after an optimizer that PyTorch does not know."""
        for part in self._live().values():
            part.write()

    @contextmanager
    def base(self) -> Iterator[nn.Module]:
        """The untouched model, for a reference pass: `with tuning.base(): model(...)`. Gradients are off inside."""
        parts = {name: part for name, part in self._live().items() if part.kept is None}  # none, inside another base()
        originals = self._originals()
        with ExitStack() as stack:
            stack.callback(torch.clear_autocast_cache)  # which holds casts of what is about to change
            for name, part in parts.items():
                part.swap_in(originals[name])
                stack.callback(part.swap_out)
            stack.callback(let_go, self.model)
            torch.clear_autocast_cache()
            with torch.no_grad():
                yield self.model

    def _originals(self) -> dict[str, Tensor]:
        kept = {name: part.original for name, part in self._live().items()}
        missing = [name for name, values in kept.items() if values is None]
        read = self._read_base(missing)
        return {name: read[name] if values is None else values for name, values in kept.items()}

    def _read_base(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The original values of whole tensors that were not kept, from where the model was loaded."""
        read: dict[str, Tensor] = base_tensors(self.model, names) if names else {}
        weights = dict(self.model.named_parameters())
        for name, values in read.items():
            values = values.to(weights[name].device)
            if name in self._new_rows:
                values = torch.cat([values, self._new_rows[name].to(values.device)])
            read[name] = values
            if not torch.equal(mark(values), self._marks[name]):
                raise ThriftyError(
                    f"{name} is not what it was when training began: the weights were changed after loading, or "
                    "the folder was replaced; save the trained model itself, or attach before loading from a folder"
                )
        return read

    def delta(self) -> Delta:
        """What changed so far, exact: the region's values before and after."""
        originals = self._originals()
        pieces = {name: part.piece(originals[name]) for name, part in self._live().items()}
        form = quantized_as(self.model)
        info = {} if form is None else {"quantize": form}
        method = self.method.to_dict()
        return Delta(pieces, method=method, total=self.plan.total, info=info, new_tokens=self.new_tokens)

    def finish(self) -> nn.Module:
        """Plain modules with the trained weights, `requires_grad` as before: the model object that was attached."""
        take_off(self.model, self._live())
        as_before(self.model, self._input_grads)
        self._parts = {}
        for name, p in self.model.named_parameters():
            p.requires_grad_(self._required.get(name, p.requires_grad))
            p.grad = None
        return self.model

    def state(self) -> dict[str, Tensor]:
        """The leaves by parameter name, for a checkpoint."""
        return {name: whole(part.leaf.detach()) for name, part in self._live().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put the leaves of `state()` back, in place, and write the weights. ThriftyError names what does not fit."""
        parts = self._live()
        for name in parts.keys() ^ state.keys():
            raise ThriftyError(f"the checkpoint and the plan differ in {name}: resume with the run's own configuration")
        for name, part in parts.items():
            if state[name].shape != part.leaf.shape:
                raise ThriftyError(
                    f"{name}: the checkpoint holds {tuple(state[name].shape)}, the plan {tuple(part.leaf.shape)}: "
                    "resume with the run's own configuration"
                )
        for name, part in parts.items():
            part.load(state[name])

    def check_gradients(self) -> None:
        """After the first backward: ThriftyError names parts that got no gradient and so would never train."""
        parts = self._live()
        without = [name for name, part in parts.items() if part.leaf.grad is None]
        blind = [name for name in without if not parts[name].in_leaf]
        if blind or len(without) == len(parts):
            first = (blind or without)[0]
            raise ThriftyError(
                f"{len(without)} of {len(parts)} trained tensors got no gradient in the first step, first {first}: "
                "something reads these weights past their modules, or the loss does not depend on them; "
                "leave them out with target_modules"
            )
        if without:
            _log.warning("%d whole tensors got no gradient and stay as they are, first %s", len(without), without[0])

    def check_changed(self) -> None:
        """After the first step with a learning rate above 0: ThriftyError where no trained value moved."""
        if not self._has_moved():
            raise ThriftyError(
                "no trained value moved in the first step: give the optimizer tuning.parameters(), "
                "a learning rate above 0, and labels that are not all -100"
            )

    def _has_moved(self) -> bool:
        return any(
            not torch.equal(mark(part.leaf), self._marks[name]) if part.in_leaf else part.moved()
            for name, part in self._live().items()
        )


def mark(tensor: Tensor) -> Tensor:
    """Enough of a whole tensor to see that it moved: one sum per row, float64."""
    values = whole(tensor.detach())
    return values.flatten(1).sum(1, dtype=torch.float64) if values.ndim > 1 else values.clone()


def attach(
    model: nn.Module,
    method: str | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Method,
    *,
    budget: Budget | float | int | str | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    seed: int = 0,
    new_tokens: NewTokens | None = None,
) -> Tuning | PeerTuning:
    """Make `model` trainable by `method` ("smt", `{"smt": {"block_size": 32}}`, or a Method), in place.

    budget: a ceiling on trained numbers: a share of the model's distinct parameters (0.01, "1%") or a count.
    batches: dicts with `input_ids`, `attention_mask`, `labels` (int64 `[B, T]`), for methods that look at gradients
    first. new_tokens: what `thrifty.add_tokens(model, tokenizer, ["<tool>"])` returned: their rows of the embedding
    (and of an untied head) are trained beside what the method trains, on top of the budget, and the delta holds them.
    Changes nothing if it raises (ThriftyError). For `{"peft": {...}}` train `tuning.model`, PEFT's wrapper.
    """
    return attach_with(model, method, budget=budget, batches=batches, seed=seed, new_tokens=new_tokens)


def attach_with(
    model: nn.Module,
    method: str | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Method,
    *,
    budget: Budget | float | int | str | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    seed: int = 0,
    loss: Loss = model_loss,
    plan: Plan | None = None,
    probe_rows: int = 4,
    new_tokens: NewTokens | None = None,
) -> Tuning | PeerTuning:
    """`attach` with the loss of a run, or with a `plan` to restore (then nothing is probed).

    Where torch.distributed is initialized all processes call this, and ThriftyError is raised where their plans differ.
    """
    method = parse_method(method)
    limit = None if budget is None else Budget.parse(budget)
    if any(hasattr(module, "_thrifty") for module in model.modules()):
        raise ThriftyError("this model is attached already: call finish() on its tuning first")
    if prepared(model) and method.parts[0].select is not None:
        check_method(method)
    if method.parts[0].select is None:
        if new_tokens is not None:
            raise ThriftyError(NO_NEW_TOKENS)
        return attach_peer(model, method, budget=limit, seed=seed)
    seconds = 0.0
    if method.schedule is not None and method.needs_probe:
        if batches is None and plan is not None:
            raise ThriftyError(
                f"method {method.name!r} looks at gradients again while it trains: pass batches=[...], those of the "
                "start, with the plan to restore"
            )
        batches = None if batches is None else list(batches)  # they are looked at more than once
    with agreeing(model) as propose:
        if plan is None:
            plan, seconds = compose(method, model, limit, batches=batches, seed=seed, loss=loss, rows=probe_rows)
        else:
            plan = Plan.of(model, plan, kept_columns=plan.kept_columns)
        plan = with_token_rows(model, plan, new_tokens)
        propose(plan)
    if method.schedule is not None:
        from .scheduled import ScheduledTuning  # it builds on this module

        return ScheduledTuning(
            model,
            method,
            plan,
            seed=seed,
            probe_seconds=seconds,
            budget=limit,
            look={"batches": batches, "loss": loss, "rows": probe_rows},
            new_tokens=new_tokens,
        )
    return Tuning(model, method, plan, seed=seed, probe_seconds=seconds, new_tokens=new_tokens)
