"""Merged checkpoints, written shard by shard without loading the model: base and delta in one, and the way back."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thrifty.core.errors import ThriftyError, nearest, unknown
from thrifty.core.files import disk_errors, new_folder, write_json
from thrifty.core.heap import trim_heap
from thrifty.core.tensor_file import Outline, TensorFile, TensorWriter, unique_keys
from thrifty.delta import Delta, fingerprint
from thrifty.delta.delta import is_applied
from thrifty.delta.files import AnyPiece

from .export import _refuse_used
from .model import resolve, warn_unquantized

__all__ = ["Checkpoint", "merge_checkpoint", "read_json", "unmerge_checkpoint"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
_TEMPLATES = "additional_chat_templates"  # the one folder that transformers keeps beside a tokenizer's files


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint's folder: name -> tensor, read from its shard each time it is asked for.

    folder: an embedded model's name, or a folder with safetensors. dtype: what floating-point tensors are cast to, as
    `load_model` would; their own unless given. ThriftyError where shards are missing or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], *, dtype: str | torch.dtype | None = None) -> None:
        self.folder = Path(resolve(os.fspath(folder)))
        self.dtype = _dtype(dtype)
        if not self.folder.is_dir():
            raise ThriftyError(f"{folder} is no folder here: download it first (hf download {folder})")
        self.index: dict[str, Any] | None = None
        if not (self.folder / SINGLE).is_file():
            self.index = read_json(self.folder / INDEX)
        self.shards = {name: TensorFile(self.folder / name) for name in self._shard_names()}
        self._where = {name: shard for shard, file in self.shards.items() for name in file}
        if self.index is not None:
            self._where |= self.index["weight_map"]
            for name, shard in self._where.items():
                if name not in self.shards[shard]:
                    raise ThriftyError(f"{self.folder / shard} lacks {name}: make or copy the checkpoint again")

    def _shard_names(self) -> list[str]:
        if self.index is None:
            return [SINGLE]
        shards = self.index.get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ThriftyError(f"{self.folder / INDEX} has no weight_map: make or copy the checkpoint again")
        names = sorted(set(shards.values()))
        for name in names:
            if Path(name).name != name or not (self.folder / name).is_file():
                raise ThriftyError(f"{self.folder} holds no shard {name!r}: make or copy the checkpoint again")
        return names

    def outline(self, name: str) -> Outline:
        """What the file says of a tensor, before it is read and cast."""
        return self.shards[self._where[name]].outlines[name]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.shards[self._where[name]][name]
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where


def merge_checkpoint(
    delta: Delta,
    base_folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
) -> str:
    """Write the checkpoint in `base_folder` with `delta` in it into the new folder `output`, whole or not at all, and
    return it. Shards keep their names; one tensor is in memory at a time.

    dtype: what the checkpoint is held in; that of the delta unless given. Everything is cast to the delta's first, as
    the model was when it was trained, but for unchanged tensors whose type is not that of most. The tokenizer and all
    small files are the base's own. ThriftyError where a changed tensor differs from the delta's base, or is not in the
    checkpoint under the model's name for it.
    """

    def trained(name: str, piece: AnyPiece, tensor: Tensor) -> Tensor:
        if fingerprint(tensor) != piece.fingerprint:
            why = "the delta is merged already" if is_applied(piece, tensor) else "another base, or a changed one"
            raise ThriftyError(f"{name} differs from the base of this delta: {why}")
        piece.write_(tensor)
        return tensor

    warn_unquantized(delta)
    return _rewrite(delta, base_folder, output, trained, dtype=dtype)


def unmerge_checkpoint(
    delta: Delta,
    merged_folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
) -> str:
    """The way back from `merge_checkpoint`: write the base of `delta`, bit for bit in the delta's dtype. ThriftyError
    where `merged_folder` is not the delta on its base."""

    def original(name: str, piece: AnyPiece, tensor: Tensor) -> Tensor:
        if not is_applied(piece, tensor):
            if fingerprint(tensor) == piece.fingerprint:
                raise ThriftyError(f"{name} is the base already: the delta is not merged, there is nothing to remove")
            raise ThriftyError(
                f"{name} is not this delta on its base: another checkpoint, one in another dtype, or changed since"
            )
        return piece.base_of(tensor)

    return _rewrite(delta, merged_folder, output, original, dtype=dtype)


def _rewrite(
    delta: Delta,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    change: Callable[[str, AnyPiece, Tensor], Tensor],
    *,
    dtype: str | torch.dtype | None,
) -> str:
    target, written = Path(output), _dtype(dtype)
    _refuse_used(target, base=os.fspath(source))
    held = _check_delta(delta)
    checkpoint = Checkpoint(source)
    _check_names(delta, checkpoint)
    main, written = _main_dtype(checkpoint), written or held

    def copy(name: str, out: TensorWriter) -> int:
        tensor = checkpoint[name]
        piece = delta.pieces.get(name)
        if piece is not None:
            tensor = change(name, piece, tensor.to(held)).to(written)
        elif tensor.dtype == main:  # what stands apart, such as float32 beside bfloat16, is meant to
            tensor = tensor.to(held).to(written)
        out.add(name, tensor)
        return tensor.nbytes

    with disk_errors(f"the checkpoint {target}", fix="free space and merge again"), new_folder(target) as folder:
        size = 0
        for shard, file in checkpoint.shards.items():
            with TensorWriter(folder / shard, metadata=file.metadata | {"format": "pt"}) as out:
                for name in file:
                    size += copy(name, out)
                    trim_heap()  # small pieces settle in what a tensor left, and the next one would not fit there
        if checkpoint.index is not None:
            metadata = dict(checkpoint.index.get("metadata") or {}) | {"total_size": size}
            write_json(folder / INDEX, checkpoint.index | {"metadata": metadata})
        _copy_others(checkpoint.folder, folder, dtype=written)
    return str(target)


def _main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating-point type that most numbers are stored in."""
    numbers: Counter[torch.dtype] = Counter()
    for name in checkpoint:
        outline = checkpoint.outline(name)
        numbers[outline.dtype] += outline.numel * outline.dtype.is_floating_point
    return numbers.most_common(1)[0][0]


def _check_delta(delta: Delta) -> torch.dtype:
    """The one dtype that the delta was made in; ThriftyError where a plain checkpoint cannot take it in."""
    if not delta.pieces:
        raise ThriftyError("this delta holds no regions (a PEFT adapter): convert it to a delta first")
    if delta.new_tokens is not None:
        raise ThriftyError(
            "this delta adds tokens, so the tokenizer changes too: `thrifty export` applies it to a checkpoint, "
            "and in Python Delta.remove takes it off again"
        )
    dtypes = {piece.dtype for piece in delta.pieces.values()}
    if len(dtypes) > 1:
        raise ThriftyError(f"this delta was made on {' and '.join(map(str, dtypes))} tensors: use `thrifty export`")
    return dtypes.pop()


def _check_names(delta: Delta, checkpoint: Checkpoint) -> None:
    """ThriftyError where the checkpoint does not hold each changed tensor once, under its name and in its shape."""
    shapes = delta.plan.shapes
    for name, shape in shapes.items():
        if name not in checkpoint:
            close = nearest(name, checkpoint)
            raise ThriftyError(
                f"the checkpoint has no tensor {name}{f' (nearest: {close})' if close else ''}: it stores this model's "
                "tensors under other names, or another model: use `thrifty export`"
            )
        if checkpoint.outline(name).shape != shape:
            raise ThriftyError(f"{name} is {checkpoint.outline(name).shape}, the delta is of {shape}: another model")
    # an embedding and a head that are one tensor in the model may lie in the file twice
    once = [name for name in shapes if not re.search(r"\.\d+\.", name)]
    for other in checkpoint:
        if other in shapes or re.search(r"\.\d+\.", other):
            continue
        for name in once:
            same = checkpoint.outline(other).shape == shapes[name] and len(shapes[name]) > 1
            if same and torch.equal(checkpoint[other], checkpoint[name]):
                raise ThriftyError(f"{other} is a copy of {name}, which the delta changes: use `thrifty export`")


def _copy_others(source: Path, target: Path, *, dtype: torch.dtype) -> None:
    """Configuration, tokenizer and all other small files of a checkpoint."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHTS) and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, target / _TEMPLATES)
    config = read_json(source / "config.json")
    for key in {"dtype", *({"torch_dtype"} & config.keys())}:  # older readers know only the second
        config[key] = str(dtype).removeprefix("torch.")
    write_json(target / "config.json", config)


def read_json(path: Path) -> dict[str, Any]:
    """A file of a checkpoint; ThriftyError where it is missing or damaged."""
    if not path.is_file():
        raise ThriftyError(f"{path.parent} is no checkpoint: it holds no {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ThriftyError(f"{path} is damaged ({error}): make or copy the checkpoint again") from None
    if not isinstance(value, dict):
        raise ThriftyError(f"{path} is damaged (no mapping): make or copy the checkpoint again")
    return value


def _dtype(value: str | torch.dtype | None) -> torch.dtype | None:
    if value is None or isinstance(value, torch.dtype):
        return value
    if value not in _DTYPES:
        raise ThriftyError(unknown("dtype", value, _DTYPES))
    return _DTYPES[value]
