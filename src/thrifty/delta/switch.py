"""Deltas: many deltas on one loaded base, one at a time in the weights, or one for each row of a batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.errors import ThriftyError, unknown
from .delta import Delta, _parameters, check_base, fitting
from .files import AnyPiece
from .held import Held, hold
from .peer import PeerDelta
from .piece import Piece
from .route import routed

__all__ = ["Deltas"]

Source = Delta | str | os.PathLike[str]


@dataclass(frozen=True)
class _Place:
    """One tensor that a delta changes."""

    name: str
    module: nn.Module
    key: str
    held: Held
    device: torch.device
    dtype: torch.dtype

    @property
    def tensor(self) -> Tensor:
        """The module's parameter as it is now."""
        if hasattr(self.module, "_thrifty"):
            raise ThriftyError(f"{self.name} is still attached: call finish() on its tuning before a delta is switched")
        found = self.module._parameters.get(self.key)
        expected = self.device, self.dtype, self.held.shape
        if found is None or (found.device, found.dtype, tuple(found.shape)) != expected:
            raise ThriftyError(
                f"{self.name} was moved, cast or replaced after the delta was added: move it back, or load "
                "the base and make Deltas anew"
            )
        return found


@dataclass(frozen=True)
class _Write:
    """One write of a swap, and how to undo it, whether it was done or cut off."""

    held: Held
    tensor: Tensor
    trained: bool  # after the write

    def run(self) -> None:
        if self.trained:
            self.held.write_(self.tensor)
        else:
            self.held.take_back_(self.tensor)

    def undo(self) -> None:
        self.held.restore_(self.tensor, trained=not self.trained)


class Deltas:
    """Many deltas on one loaded base:

        deltas = thrifty.Deltas(model, {"sql": "out/sql/delta", "chat": delta})
        deltas.activate("sql")  # now the weights are those of sql, bit for bit
        with deltas.using("chat"):
            model.generate(**batch)
        with deltas.route(["sql", None, "chat"]):  # row i of the batch with delta i; None: the base
            model.generate(**batch)

    Values and originals of all deltas stay in memory on the model's device; a swap writes the changed regions, and is
    exact however often it is done. A low-rank pair is held as its factors, so a swap computes its product (all of the
    matrix, with the same bits each time). Between swaps nothing else may write the changed tensors.

    model: the base, as loaded; with none of the deltas applied. deltas: name -> Delta, or its folder.
    """

    def __init__(self, model: nn.Module, deltas: Mapping[str, Source] | None = None) -> None:
        _parameters(model)  # an attached model is refused
        self.model = model
        self._places: dict[str, tuple[_Place, ...]] = {}
        self._active: str | None = None
        self._routing = False
        for name, delta in (deltas or {}).items():
            self.add(name, delta)

    @property
    def names(self) -> tuple[str, ...]:
        """The deltas held, in the order they were added."""
        return tuple(self._places)

    @property
    def active(self) -> str | None:
        """The delta that is in the weights; None: the base."""
        return self._active

    def add(self, name: str, delta: Source) -> None:
        """Hold one more delta, a Delta or its folder. ThriftyError, and nothing is kept, where the model is not its
        exact base. An active delta is taken out for the check, and put back."""
        self._not_while_routing("add")
        if not isinstance(name, str) or not name:
            raise ThriftyError(f"the name of a delta must be a text that is not empty, not {name!r}")
        if name in self._places:
            raise ThriftyError(f"a delta {name!r} is held already: remove({name!r}) it first, or give another name")
        delta = delta if isinstance(delta, Delta) else Delta.load(delta)
        _refuse(name, delta)
        with self.using(None):
            places = _places(self.model, delta)
        self._places[name] = places

    def remove(self, name: str) -> None:
        """Hold `name` no longer; it is deactivated first."""
        self._not_while_routing("remove")
        self._known(name)
        if name == self._active:
            self.deactivate()
        del self._places[name]

    def activate(self, name: str) -> None:
        """Put `name` into the weights, in place of the one that is active; where an error comes between, the weights
        are as they were before."""
        self._switch(self._known(name))

    def deactivate(self) -> None:
        """Make the weights those of the base again, bit for bit."""
        self._switch(None)

    @contextmanager
    def using(self, name: str | None) -> Iterator[nn.Module]:
        """`name` is active inside (None: the base), and afterwards what was active before. Gives the model."""
        before = self._active
        self._switch(None if name is None else self._known(name))
        try:
            yield self.model
        finally:
            self._switch(before if before in self._places else None)

    @contextmanager
    def route(self, requests: Sequence[str | None]) -> Iterator[nn.Module]:
        """Row i of every batch inside is computed with delta `requests[i]` (None: the base). Gives the model.

        The weights are those of the base meanwhile, also where a delta is active outside. Linear layers add
        x dW^T for their rows; norms, embeddings, and linear layers whose whole weight changed are computed once more
        for them, and a trained copy of such a tensor exists while the block runs, unless all of it changed. Results
        differ from those of the delta in the weights by rounding.

        ThriftyError for a module that does not see one row for each request (stacked experts, which get the tokens of
        all rows together), and at the end for one that was not called though its weights changed. Beam search and
        `num_return_sequences` make more rows than requests and are refused. That the first axis is the batch can only
        be judged by its size. Where layers are computed again in backward (gradient checkpointing), backward
        belongs inside the block. After Zhao et al. 2024, "LoRA Land" (LoRAX's heterogeneous batches; the abstract
        only), without the server.
        """
        names = self._requested(requests)
        with self.using(None):
            changes = {
                name: {id(place.tensor): place.held for place in self._places[name]}
                for name in dict.fromkeys(name for name in names if name is not None)
            }
            self._routing = True
            try:
                with routed(self.model, names, changes):
                    yield self.model
            finally:
                self._routing = False

    def _requested(self, requests: Sequence[str | None]) -> list[str | None]:
        if isinstance(requests, str) or not requests:
            raise ThriftyError(f"route needs a list with a delta or None for each row of the batch, not {requests!r}")
        return [None if name is None else self._known(name) for name in requests]

    def _known(self, name: str) -> str:
        if name not in self._places:
            raise ThriftyError(unknown("delta", str(name), self._places))
        return name

    def _not_while_routing(self, what: str) -> None:
        if self._routing:
            raise ThriftyError(f"{what} does not work inside `with deltas.route(...)`: leave the block first")

    def _switch(self, name: str | None) -> None:
        self._not_while_routing("a switch")
        before = self._active
        if name == before:
            return
        back = [] if before is None else [_Write(p.held, p.tensor, False) for p in self._places[before]]
        on = [] if name is None else [_Write(p.held, p.tensor, True) for p in self._places[name]]
        with torch.no_grad(), ExitStack() as undo:
            undo.callback(setattr, self, "_active", before)
            undo.callback(torch.clear_autocast_cache)
            for write in (*back, *on):
                undo.callback(write.undo)  # before the write, which may be cut off
                write.run()
            torch.clear_autocast_cache()  # it keeps narrow copies of weights, and does not notice that they changed
            self._active = name
            undo.pop_all()


def _refuse(name: str, delta: Delta) -> None:
    if isinstance(delta, PeerDelta):
        raise ThriftyError(
            f"{name!r} is a PEFT adapter, which has no exact way back: convert it to a delta of regions first, or "
            "switch it with PEFT's own set_adapter"
        )
    if delta.new_tokens is not None:
        raise ThriftyError(
            f"{name!r} adds tokens to the vocabulary, which the base of the other deltas does not have: give it a "
            "model of its own, with Delta.apply"
        )


def _places(model: nn.Module, delta: Delta) -> tuple[_Place, ...]:
    """What `delta` changes in `model`, which must be its exact base."""
    parameters, plan = _parameters(model), delta.plan
    seen: dict[int, tuple[str, AnyPiece]] = {}
    places = []
    for name in plan:
        piece = delta.pieces[name]
        tensor = fitting(name, piece, parameters)
        if tensor.device.type == "meta" or not tensor.is_contiguous():
            raise ThriftyError(f"{name} is offloaded or not contiguous in memory: load the model onto one device")
        check_base(name, piece, tensor)
        if id(tensor) in seen:
            _refuse_two_changes(name, piece, *seen[id(tensor)])
            continue
        seen[id(tensor)] = name, piece
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        places.append(_Place(name, module, key, hold(piece, tensor), tensor.device, tensor.dtype))
    return tuple(places)


def _refuse_two_changes(name: str, piece: AnyPiece, other_name: str, other: AnyPiece) -> None:
    if not isinstance(piece, Piece) or not isinstance(other, Piece) or not _equal(piece, other):
        raise ThriftyError(
            f"{other_name} and {name} are one tensor in this model, and the delta changes it in two ways: load the "
            "model that it was trained on"
        )


def _equal(piece: Piece, other: Piece) -> bool:
    return piece.region == other.region and torch.equal(piece.values, other.values)
