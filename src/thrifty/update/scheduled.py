"""A tuning whose plan changes while it trains: what stays goes on, what leaves stays as it is, the delta holds both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ..core.budget import Budget
from ..core.entries import Entries
from ..core.errors import ThriftyError
from ..core.method import Method
from ..core.plan import Plan, plan_from_files, plan_to_files
from ..core.processes import processes
from ..core.region import Blocks, Whole
from ..delta import Delta, Piece
from ..select.compose import compose
from ..select.token_rows import with_token_rows
from .agreement import agreeing
from .carry import Leaf, carry_leaf, held, leaves_of, swap
from .part import leaf_dtype
from .place import take_off
from .sharded import refuse_sharded
from .steps import listen
from .trained import Trained, base_of, ever_trained, settled_under
from .tuning import Tuning, mark

__all__ = ["ScheduledTuning"]


class ScheduledTuning(Tuning):
    """`plan` is what is trained now; the delta covers all that ever was.

    Works in any loop that keeps this object: the schedule is asked around every step of the PyTorch optimizer that
    holds all of `parameters()`, and its groups are changed in place. `step`: how many steps it made. `total_steps`: how
    many it is going to make; set it where a schedule needs to know. `memory`: what the schedule keeps. `rebuild`:
    called after each change of the leaves, to be set by who wraps the model for several processes. `look`: what the
    selectors are given to look at gradients again (`batches`, `loss`, `rows` of `compose`).
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        plan: Plan,
        *,
        budget: Budget | None,
        look: Mapping[str, Any],
        **given: Any,
    ) -> None:
        super().__init__(model, method, _can_change(plan, method), **given)
        assert method.schedule is not None
        self.schedule, self.budget, self.look = method.schedule, budget, look
        self.step = 0
        self.total_steps: int | None = None
        self.memory: dict[str, Any] = {}
        self.rebuild: Callable[[], None] | None = None
        self._settled: dict[str, Trained] = {}  # trained under an earlier plan, beside what the parts hold
        self._optimizer: Optimizer | None = None  # the one whose step is just made
        self._changed = False
        listen(self)

    def before_step(self, optimizer: Optimizer) -> None:
        """Called by every PyTorch optimizer before its step."""
        if self._parts and held(optimizer, self.parameters()):
            self.schedule.before_step(self)

    def after_step(self, optimizer: Optimizer) -> None:
        """Called by every PyTorch optimizer after its step."""
        if self._parts and held(optimizer, self.parameters()):
            self.step, self._optimizer = self.step + 1, optimizer
            try:
                self.schedule.after_step(self)
            finally:
                self._optimizer = None

    def choose(self, model: nn.Module, *, seed: int) -> Plan:
        """What the method's selectors choose on the plain `model` as it is now; they see the same batches each time."""
        return compose(self.method, model, self.budget, seed=seed, **self.look)[0]

    def replan(
        self, choose: Callable[[nn.Module], Plan], *, optimizer: Optimizer | None = None, carry: bool = True
    ) -> None:
        """Train another region from here on: `choose` is given the plain model and returns its plan.

        All weights keep their values. Numbers that stay keep their float32 offset and, with `carry`, the optimizer's
        moments; numbers that leave keep their trained value. `optimizer`: the one that holds the leaves, by default
        the one that just stepped. ThriftyError under several processes where nobody set `rebuild`, or where their
        plans differ. After any error training can go on by the plan before, with its moments.
        """
        if self.rebuild is None and processes() > 1:
            raise ThriftyError(
                f"method {self.method.name!r} changes what is trained, which a wrapper of several processes would not "
                "notice: set tuning.rebuild to a function that makes it notice, or train in one process"
            )
        for part in self._parts.values():
            refuse_sharded(part.leaf, f"method {self.method.name!r}, which changes what is trained,")
        optimizer = self._optimizer if optimizer is None else optimizer
        self._changed = self._changed or self._has_moved()
        ever, old, plan, made = self._ever(), leaves_of(self._live()), self.plan, False
        take_off(self.model, self._parts)
        try:
            with agreeing(self.model) as propose:
                chosen = with_token_rows(self.model, _can_change(choose(self.model), self.method), self.new_tokens)
                propose(chosen)
            plan, made = chosen, True
        finally:  # a plan that cannot be made leaves the one before in place, in new leaves all the same
            self._settled = settled_under(plan, ever)
            self._place(plan)
            self._take_over(ever, old)
            if optimizer is not None:
                swap(optimizer, old, self._parts, carry=carry or not made)
            for name, was in old.items():
                if plan.get(name) != was.region:
                    was.leaf.grad = None
            if self.rebuild is not None:
                self.rebuild()

    @torch.no_grad()
    def _take_over(self, ever: Mapping[str, Trained], old: Mapping[str, Leaf]) -> None:
        """Give parts just placed, which took the weights for the base, the originals and offsets to go on from."""
        known = {name: ever[name] for name in self._parts if name in ever}
        unread = [n for n, was in known.items() if was.original is None and not self._parts[n].in_leaf]
        known |= {name: Trained(known[name].region, values) for name, values in self._read_base(unread).items()}
        for name, was in known.items():
            part = self._parts[name]
            if was.original is None:
                part.original = None
            elif part.in_leaf:
                base = base_of(part.weight, was)
                self._marks[name] = mark(base)
                part.original = base if self._keep else None
            else:
                part.original = part.region.gather(base_of(part.weight, was))
                part.adopt_weight()
            part.stamp = int(name not in self._settled)  # else the part alone knows that it was trained
            if name in old:
                carry_leaf(old[name], part)
                part.stamp = max(part.stamp, old[name].stamp)

    @contextmanager
    def base(self) -> Iterator[nn.Module]:
        """The untouched model, for a reference pass: `with tuning.base(): model(...)`. Gradients are off inside."""
        outer = all(part.kept is None for part in self._live().values())
        settled = self._read(self._settled) if outer else {}  # inside another base() they are swapped already
        weights = dict(self.model.named_parameters())
        with super().base() as model, ExitStack() as stack:
            for name, was in settled.items():  # after the parts, whose numbers may be among these
                assert was.original is not None
                weight = weights[name].data
                stack.callback(was.region.scatter_, weight, was.region.gather(weight))
                was.region.scatter_(weight, was.original)
            yield model

    def _read(self, trained: Mapping[str, Trained]) -> dict[str, Trained]:
        """`trained` with originals that were not kept read again."""
        read = self._read_base([name for name, was in trained.items() if was.original is None])
        return {name: Trained(was.region, read[name]) if name in read else was for name, was in trained.items()}

    def _ever(self, *, unstepped: bool = False) -> dict[str, Trained]:
        """What was ever trained, in the model's order. `unstepped`: also what no step moved since it was placed."""
        parts = {n: part for n, part in self._live().items() if unstepped or part.stamp or part.dirty}
        ever = ever_trained(parts, self._settled)
        return {name: ever[name] for name, _ in self.model.named_parameters() if name in ever}

    @torch.no_grad()
    def rewind(self) -> None:
        """Every number ever trained goes back to what it was at the start, bit for bit."""
        self._changed = self._changed or self._has_moved()
        weights = dict(self.model.named_parameters())
        for name, was in self._read(self._ever(unstepped=True)).items():
            assert was.original is not None
            was.region.scatter_(weights[name].data, was.original)
        for part in self._parts.values():
            part.adopt_weight()
            part.stamp = 0
        self._settled = {}

    def changes(self) -> Iterator[tuple[str, Tensor]]:
        """Parameter name -> how far its values are from the start, dense, float32 or wider, one after the other."""
        weights = dict(self.model.named_parameters())
        for name, was in self._read(self._ever(unstepped=True)).items():
            weight = weights[name].detach()
            dtype = leaf_dtype(weight.dtype)
            yield name, weight.to(dtype) - base_of(weight, was).to(dtype)

    def delta(self) -> Delta:
        """What changed so far, exact: values before and after of all numbers that were ever trained."""
        for part in self._live().values():
            part.flush()
        pieces, weights = {}, dict(self.model.named_parameters())
        for name, was in self._read(self._ever(unstepped=self.step == 0)).items():
            base = base_of(weights[name], was)
            pieces[name] = Piece.of(base, weights[name], was.region)
        return Delta(pieces, method=self.method.to_dict(), total=self.plan.total, new_tokens=self.new_tokens)

    def progress(self) -> dict[str, Any]:
        """What a checkpoint holds beside `plan` and `state()`: nested dicts of numbers and tensors."""
        regions = {name: was.region for name, was in self._settled.items()}
        weights = dict(self.model.named_parameters())
        shapes = {name: tuple(weights[name].shape) for name in regions}
        record, index = plan_to_files(Plan(regions, shapes=shapes, total=self.plan.total))
        values = {name: region.gather(weights[name]) for name, region in regions.items()}
        return {
            "step": self.step,
            "memory": self.memory,
            "stepped": [name for name, part in self._live().items() if part.stamp],
            "settled": record,
            "index": index,
            "values": values,
        }

    def restore(self, plan: Plan, state: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Put back a plan with the `state()` and the `progress()` that belong to it."""
        if self.step > 0:
            self.rewind()
        if dict(plan) != dict(self.plan):
            self.replan(lambda model: Plan.of(model, plan, kept_columns=plan.kept_columns), carry=False)
        weights = dict(self.model.named_parameters())
        for name, region in plan_from_files(progress["settled"], progress["index"]).items():
            weight = weights[name]
            reread = isinstance(region, Whole) and weight.dtype == leaf_dtype(weight.dtype) and not self._keep
            if reread:
                self._marks.setdefault(name, mark(weight))
            self._settled[name] = Trained(region, None if reread else region.gather(weight).cpu())
            region.scatter_(weight.data, progress["values"][name])
        self.step, self.memory = progress["step"], dict(progress["memory"])
        self.load_state(state)
        for name, part in self._parts.items():
            part.stamp = int(name in progress["stepped"])

    def check_changed(self) -> None:
        """After the first step with a learning rate above 0: ThriftyError where no trained value moved."""
        if not self._changed:
            super().check_changed()


def _can_change(plan: Plan, method: Method) -> Plan:
    """`plan`; ThriftyError where it holds what cannot be carried from one plan to the next."""
    for name, region in plan.items():
        if not isinstance(region, Whole | Blocks | Entries):
            raise ThriftyError(
                f"method {method.name!r} changes its plan while it trains, but {name} trains a {region.kind} region, "
                "which cannot be carried from plan to plan: train blocks, entries or whole tensors there, or leave "
                "the plan as it is"
            )
    return plan
