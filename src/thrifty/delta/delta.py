"""Delta: what changed, exact. A folder with `delta.json` (what, of which base) and `delta.safetensors` (the numbers).

For each touched tensor: the region, its values after and before in the tensor's own dtype, and the fingerprint of the
base tensor; of a low-rank pair the factors (`low_rank.py`). Applying writes the values, removing writes the originals:
both exact, bit for bit. Where tokens were added to the vocabulary, `delta.json` names them: applying adds their rows
first, removing takes them away last.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ThriftyError, nearest
from ..core.plan import Plan
from .digest import bits, fingerprint
from .files import FORMAT, JSON, AnyPiece, read_head, read_pieces, write_folder
from .piece import LazyPieces, Piece
from .vocabulary import NewTokens, vocabulary_tensors

__all__ = ["APPLIED", "Delta"]

APPLIED = "_thrifty_applied_deltas"  # on a model: how many deltas lie on what its folder holds


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    if any(hasattr(module, "_thrifty") for module in model.modules()):
        raise ThriftyError(
            "this model is still attached: call finish() on its tuning before a delta is applied or removed"
        )
    return dict(model.named_parameters(remove_duplicate=False))


def fitting(name: str, piece: AnyPiece, parameters: Mapping[str, Tensor]) -> Tensor:
    """The one of `parameters` that `piece` belongs to; ThriftyError where there is none of its shape and dtype."""
    if name not in parameters:
        close = nearest(name, parameters)
        raise ThriftyError(
            f"the model has no tensor {name}"
            + (f" (nearest: {close})" if close else "")
            + ": this delta is of another model"
        )
    tensor = parameters[name]
    if tuple(tensor.shape) != piece.shape:
        raise ThriftyError(f"{name} is {tuple(tensor.shape)}, the delta is of {piece.shape}: another model")
    if tensor.dtype != piece.dtype:
        raise ThriftyError(
            f"{name} is {tensor.dtype}, the delta was made on {piece.dtype}: "
            f"load the base with dtype={str(piece.dtype).removeprefix('torch.')}"
        )
    return tensor


def check_base(name: str, piece: AnyPiece, tensor: Tensor) -> None:
    """ThriftyError where `tensor` is not the exact base of `piece`."""
    if fingerprint(tensor) != piece.fingerprint:
        why = "the delta is applied already" if is_applied(piece, tensor) else "another base, or a changed one"
        raise ThriftyError(f"{name} differs from the base of this delta: {why}")


def is_applied(piece: AnyPiece, tensor: Tensor) -> bool:
    """Is `tensor` the base of `piece` with exactly its change? True, too, of the base where nothing changes."""
    base = piece.base_of(tensor)
    if fingerprint(base) != piece.fingerprint:
        return False
    piece.write_(base)
    return torch.equal(bits(base), bits(tensor))


@dataclass
class Delta:
    """The result of an in-place method: parameter name -> `Piece`. `info` may hold a summary of the run."""

    pieces: Mapping[str, AnyPiece]
    method: Mapping[str, Any]
    total: int  # distinct parameters of the base
    info: dict[str, Any] = field(default_factory=dict)
    new_tokens: NewTokens | None = None  # added to the base's vocabulary; `new_tokens.extend` teaches a tokenizer

    @property
    def plan(self) -> Plan:
        """Which regions changed."""
        if isinstance(self.pieces, LazyPieces):
            return self.pieces.plan
        regions = {name: piece.region for name, piece in self.pieces.items()}
        return Plan(regions, shapes={n: p.shape for n, p in self.pieces.items()}, total=self.total)

    def _fits(self, model: nn.Module) -> dict[str, Tensor]:
        parameters = _parameters(model)
        return {name: fitting(name, piece, parameters) for name, piece in self.pieces.items()}

    def apply(self, model: nn.Module) -> nn.Module:
        """Write the trained values into `model`, which must be the exact base; ThriftyError names the first tensor that
        differs, and nothing is written. Returns `model`."""
        _parameters(model)  # nothing grows while it is attached
        with ExitStack() as undo:
            if self.new_tokens is not None and self.new_tokens.grow(model):
                undo.callback(self.new_tokens.shrink, model)
                self.fill(model, first=self.new_tokens.base_rows)
            self._write(model)
            undo.pop_all()
        setattr(model, APPLIED, getattr(model, APPLIED, 0) + 1)
        return model

    def fill(self, model: nn.Module, *, first: int) -> None:
        """Give the rows from `first` on, those of new tokens, the values that they had before training."""
        for name, tensor in vocabulary_tensors(model).items():
            piece = self.pieces.get(name)
            if isinstance(piece, Piece) and piece.shape == tuple(tensor.shape):
                tensor.data[first:] = piece.base_of(tensor)[first:]

    def _write(self, model: nn.Module) -> None:
        tensors = self._fits(model)
        for name, piece in self.pieces.items():
            check_base(name, piece, tensors[name])
        for name, piece in self.pieces.items():
            piece.write_(tensors[name])

    def remove(self, model: nn.Module) -> nn.Module:
        """Write the original values back; afterwards `model` is the base bit for bit, else ThriftyError and no
        change."""
        _parameters(model)
        if self.new_tokens is not None and self.new_tokens.lacking(model):
            raise ThriftyError("the model lacks the delta's new tokens: it is not applied, there is nothing to remove")
        tensors = self._fits(model)
        first = next(iter(self.pieces), None)
        if first and all(fingerprint(tensors[name]) == piece.fingerprint for name, piece in self.pieces.items()):
            raise ThriftyError(f"{first} is the base already: the delta is not applied, there is nothing to remove")
        for name, piece in self.pieces.items():
            if not is_applied(piece, tensors[name]):
                raise ThriftyError(
                    f"{name} is not this delta on its base: another model, or values that were changed since"
                )
        for name, piece in self.pieces.items():
            tensors[name].data.copy_(piece.base_of(tensors[name]))
        if self.new_tokens is not None:
            self.new_tokens.shrink(model)
        setattr(model, APPLIED, getattr(model, APPLIED, 0) - 1)
        return model

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the folder, whole or not at all. An existing delta is replaced, anything else is refused."""
        head = {
            "format": FORMAT,
            "kind": "regions",
            "thrifty": version("thrifty"),
            "method": dict(self.method),
            "total": self.total,
            "info": self.info,
        }
        if self.new_tokens is not None:
            head["new_tokens"] = self.new_tokens.to_dict()
        write_folder(Path(folder), head, self.pieces)

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Delta:
        """Open a folder that `save` wrote; values are read when they are needed, one tensor at a time. ThriftyError
        where it is missing, damaged or of a newer format."""
        head = read_head(Path(folder))
        if head["kind"] == "peft":
            from .peer import PeerDelta

            return PeerDelta.read(Path(folder), head)
        try:
            pieces = read_pieces(Path(folder), head)
            new = None if head.get("new_tokens") is None else NewTokens.from_dict(head["new_tokens"])
            return Delta(
                pieces,
                method=dict(head["method"]),
                total=pieces.plan.total,
                info=dict(head.get("info", {})),
                new_tokens=new,
            )
        except ThriftyError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise ThriftyError(
                f"{Path(folder) / JSON} lacks or garbles {first}: make or copy the delta again"
            ) from None
