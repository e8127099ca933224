"""Delta: what changed, exact. A folder with `delta.json` (what, of which base) and `delta.safetensors` (the numbers).

For each touched tensor: the region, its values after and before in the tensor's own dtype, and the fingerprint of the
base tensor; of a low-rank pair the factors (`low_rank.py`). Applying writes the values, removing writes the originals:
both exact, bit for bit. Where tokens were added to the vocabulary, `delta.json` names them: applying adds their rows
first, removing takes them away last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.errors import ThriftyError, nearest
from ..core.files import new_folder
from ..core.low_rank import LowRank
from ..core.plan import Plan, region_from_files
from ..core.region import Region
from .digest import fingerprint
from .low_rank import LowRankPiece
from .vocabulary import NewTokens, vocabulary_tensors

__all__ = ["FORMAT", "Delta", "Piece"]

FORMAT = 1
_JSON, _TENSORS = "delta.json", "delta.safetensors"


@dataclass(frozen=True)
class Piece:
    """What changed in one tensor: packed values after and before, in the tensor's dtype, on the CPU."""

    region: Region
    shape: tuple[int, ...]
    values: Tensor
    original: Tensor
    fingerprint: str  # of the whole base tensor

    def base_of(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` with the original values in the region."""
        base = tensor.detach().clone()
        self.region.scatter_(base, self.original)
        return base

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def write_(self, tensor: Tensor) -> None:
        """Write the trained values into the base `tensor`."""
        self.region.scatter_(tensor.data, self.values)

    def to_files(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file needs to hold: a JSON record, and tensors by what they are."""
        return {}, {"values": self.values, "base": self.original}


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    if any(hasattr(module, "_thrifty") for module in model.modules()):
        raise ThriftyError(
            "this model is still attached: call finish() on its tuning before a delta is applied or removed"
        )
    return dict(model.named_parameters(remove_duplicate=False))


@dataclass
class Delta:
    """The result of an in-place method: parameter name -> `Piece`. `info` may hold a summary of the run."""

    pieces: Mapping[str, Piece | LowRankPiece]
    method: Mapping[str, Any]
    total: int  # distinct parameters of the base
    info: dict[str, Any] = field(default_factory=dict)
    new_tokens: NewTokens | None = None  # added to the base's vocabulary; `new_tokens.extend` teaches a tokenizer

    @property
    def plan(self) -> Plan:
        """Which regions changed."""
        regions = {name: piece.region for name, piece in self.pieces.items()}
        return Plan(regions, shapes={n: p.shape for n, p in self.pieces.items()}, total=self.total)

    def _fits(self, model: nn.Module) -> dict[str, Tensor]:
        parameters = _parameters(model)
        for name, piece in self.pieces.items():
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
        return {name: parameters[name] for name in self.pieces}

    def apply(self, model: nn.Module) -> nn.Module:
        """Write the trained values into `model`, which must be the exact base; ThriftyError names the first tensor that
        differs, and nothing is written. Returns `model`."""
        _parameters(model)  # nothing grows while it is attached
        with ExitStack() as undo:
            if self.new_tokens is not None and self.new_tokens.grow(model):
                undo.callback(self.new_tokens.shrink, model)
                self._fill(model, first=self.new_tokens.base_rows)
            self._write(model)
            undo.pop_all()
        return model

    def _fill(self, model: nn.Module, *, first: int) -> None:
        """Give the rows from `first` on the values that they had before training."""
        for name, tensor in vocabulary_tensors(model).items():
            piece = self.pieces.get(name)
            if isinstance(piece, Piece) and piece.shape == tuple(tensor.shape):
                tensor.data[first:] = piece.base_of(tensor)[first:]

    def _write(self, model: nn.Module) -> None:
        tensors = self._fits(model)
        for name, piece in self.pieces.items():
            if fingerprint(tensors[name]) != piece.fingerprint:
                applied = fingerprint(piece.base_of(tensors[name])) == piece.fingerprint
                why = "the delta is applied already" if applied else "another base, or a changed one"
                raise ThriftyError(f"{name} differs from the base of this delta: {why}")
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
            if fingerprint(piece.base_of(tensors[name])) != piece.fingerprint:
                raise ThriftyError(f"{name} differs from the base of this delta outside its region: another base")
        for name, piece in self.pieces.items():
            tensors[name].data.copy_(piece.base_of(tensors[name]))
        if self.new_tokens is not None:
            self.new_tokens.shrink(model)
        return model

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the folder, whole or not at all. An existing delta is replaced, anything else is refused."""
        refuse_other(folder)
        tensors: dict[str, Tensor] = {}
        records: dict[str, Any] = {}
        for name, piece in self.pieces.items():
            region, index = piece.region.to_files()
            record, held = piece.to_files()
            records[name] = {"region": region, "of": list(piece.shape), "base_sha256": piece.fingerprint} | record
            tensors |= {f"{key}:{name}": tensor.contiguous() for key, tensor in held.items()}
            if index is not None:
                tensors[f"index:{name}"] = index.contiguous()
        head = {
            "format": FORMAT,
            "kind": "regions",
            "thrifty": version("thrifty"),
            "method": dict(self.method),
            "total": self.total,
            "tensors": records,
            "info": self.info,
        }
        if self.new_tokens is not None:
            head["new_tokens"] = self.new_tokens.to_dict()
        with new_folder(Path(folder)) as aside:
            save_file(tensors, aside / _TENSORS)
            (aside / _JSON).write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Delta:
        """Read a folder that `save` wrote. ThriftyError where it is missing, damaged or of a newer format."""
        head = read_head(folder)
        if head["kind"] == "peft":
            from .peer import PeerDelta

            return PeerDelta.read(Path(folder), head)
        file = Path(folder) / _TENSORS
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ThriftyError(f"{file} is damaged or incomplete ({error}): make or copy the delta again") from None
        try:
            pieces = {name: _piece(name, record, tensors) for name, record in head["tensors"].items()}
            new = None if head.get("new_tokens") is None else NewTokens.from_dict(head["new_tokens"])
            return Delta(
                pieces, method=head["method"], total=int(head["total"]), info=head.get("info", {}), new_tokens=new
            )
        except ThriftyError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise ThriftyError(
                f"{Path(folder) / _JSON} lacks or garbles {first}: make or copy the delta again"
            ) from None


def _piece(name: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Piece | LowRankPiece:
    region = region_from_files(record["region"], tensors.get(f"index:{name}"))
    shape = tuple(int(n) for n in record["of"])
    region.check(name, shape)
    if isinstance(region, LowRank):
        return LowRankPiece.from_files(name, record, tensors, region=region)
    values, original = tensors[f"values:{name}"], tensors[f"base:{name}"]
    size = region.size(shape)
    if values.numel() != size or original.numel() != size or values.dtype != original.dtype:
        raise ThriftyError(f"{name}: the delta holds {values.numel()} values for a region of {size}: it is damaged")
    return Piece(region, shape, values, original, str(record["base_sha256"]))


def refuse_other(folder: str | os.PathLike[str]) -> None:
    """ThriftyError where `folder` exists and is no delta."""
    path = Path(folder)
    if path.exists() and not (path / _JSON).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise ThriftyError(f"{path} exists and is no delta: give another folder, or remove it first")


def read_head(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """`delta.json`, checked for kind and format."""
    path = Path(folder) / _JSON
    if not path.is_file():
        raise ThriftyError(f"{folder} is no delta folder: it holds no {_JSON}")
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ThriftyError(f"{path} is damaged ({error}): make or copy the delta again") from None
    if not isinstance(head, dict) or head.get("kind") not in ("regions", "peft"):
        raise ThriftyError(f"{path} describes no delta that this version knows")
    if head.get("format") != FORMAT:
        raise ThriftyError(f"{path} has format {head.get('format')!r}, this version reads {FORMAT}: upgrade thrifty")
    return head
