"""safetensors files of any size, one tensor in memory at a time: read lazily, written as tensors come."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ThriftyError

__all__ = ["Outline", "TensorFile", "TensorWriter", "unique_keys"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENTS = (8, 4, 2, 1)


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(object_pairs_hook=...)`: ValueError where a key comes twice, of which readers take either."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} comes twice")
        found[key] = value
    return found


@dataclass(frozen=True)
class Outline:
    """What a file says of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class TensorFile(Mapping[str, Tensor]):
    """Tensor name -> tensor, read from the file each time it is asked for. The file stays open, so that replacing it
    does not change what is read.

    ThriftyError where it is damaged, holds a key twice, or a type that PyTorch computes with nowhere here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "pt"):  # lengths, overlaps and offsets are checked by the library
                pass
            self._file: IO[bytes] = open(path, "rb")  # noqa: SIM115
            size = struct.unpack("<Q", self._file.read(8))[0]
            head = json.loads(self._file.read(size), object_pairs_hook=unique_keys)
            self.metadata: dict[str, str] = head.pop("__metadata__", None) or {}
            self.outlines = {name: _outline(entry, first=8 + size) for name, entry in head.items()}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise ThriftyError(f"{path} is damaged or incomplete ({error}): make or copy it again") from None

    def __getitem__(self, name: str) -> Tensor:
        outline = self.outlines[name]
        data = bytearray(outline.nbytes)
        self._file.seek(outline.start)
        if self._file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise ThriftyError(f"{self.path} was cut while it was read: make or copy it again")
        flat = torch.frombuffer(data, dtype=outline.dtype) if data else torch.empty(0, dtype=outline.dtype)
        return flat.view(outline.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.outlines)

    def __len__(self) -> int:
        return len(self.outlines)

    def __contains__(self, name: object) -> bool:
        return name in self.outlines


def _outline(entry: Mapping[str, Any], *, first: int) -> Outline:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"type {entry['dtype']!r} is not known here")
    return Outline(_DTYPES[entry["dtype"]], tuple(entry["shape"]), first + entry["data_offsets"][0])


class TensorWriter:
    """Writes a safetensors file tensor by tensor: `with TensorWriter(path) as file: file.add("w", w)`.

    Readers map the file, so wider types must lie first; what comes is kept apart by width until the end. OSError on a
    full disk; where the block is left by an error, no file is there.
    """

    def __init__(self, path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
        self.path, self.metadata = path, dict(metadata or {})
        self._entries: dict[str, tuple[int, Tensor, int]] = {}  # width, an empty tensor of its dtype and shape, bytes
        self._files: dict[int, IO[bytes]] = {}

    def __enter__(self) -> TensorWriter:
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Append `tensor`, from any device."""
        if name in self._entries or tensor.dtype not in _NAMES:
            raise ValueError(f"{name} is written twice, or {tensor.dtype} cannot be")
        width = tensor.dtype.itemsize
        if width not in self._files:
            self._files[width] = open(self._part(width), "wb")  # noqa: SIM115
        flat = tensor.detach().cpu().contiguous().flatten()
        self._files[width].write(flat.view(torch.uint8).numpy().data)
        self._entries[name] = width, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), tensor.nbytes

    def _part(self, width: int) -> Path:
        return self.path.with_name(f".{self.path.name}.{width}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for file in self._files.values():
                file.close()
            if kind is None:
                self._finish()
        finally:
            for width in self._files:
                self._part(width).unlink(missing_ok=True)

    def _finish(self) -> None:
        head: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        offset = 0
        for width in _ALIGNMENTS:
            for name, (own, empty, nbytes) in self._entries.items():
                if own == width:
                    ends = [offset, offset + nbytes]
                    head[name] = {"dtype": _NAMES[empty.dtype], "shape": list(empty.shape), "data_offsets": ends}
                    offset += nbytes
        text = json.dumps(head, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(self.path, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for width in _ALIGNMENTS:
                if width in self._files:
                    with open(self._part(width), "rb") as part:
                        shutil.copyfileobj(part, out, 2**20)
                    self._part(width).unlink()
