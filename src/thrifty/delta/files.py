"""The folder of a delta: `delta.json` and `delta.safetensors` (docs/delta-format.md), read and written a tensor at a
time. Everything is checked against the file's header when a folder is opened, before a value is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import ThriftyError
from ..core.files import new_folder
from ..core.heap import trim_heap
from ..core.low_rank import LowRank
from ..core.plan import Plan, region_from_files
from ..core.region import Region
from ..core.tensor_file import TensorFile, TensorWriter, unique_keys
from .coded import CodedPiece
from .digest import fingerprint
from .low_rank import LowRankPiece
from .piece import LazyPieces, Piece

__all__ = ["FORMAT", "JSON", "AnyPiece", "nbytes", "read_head", "read_pieces", "refuse_other", "write_folder"]

FORMAT = 1
JSON, TENSORS = "delta.json", "delta.safetensors"
AnyPiece = Piece | LowRankPiece | CodedPiece


def write_folder(folder: Path, head: Mapping[str, Any], pieces: Mapping[str, AnyPiece]) -> None:
    """Write the folder, whole or not at all, one piece in memory at a time. `head`: `delta.json` without `tensors`."""
    refuse_other(folder)
    records: dict[str, Any] = {}
    with new_folder(folder) as aside:
        with TensorWriter(aside / TENSORS) as file:
            for name, piece in pieces.items():
                region, index = piece.region.to_files()
                record, held = piece.to_files()
                if index is not None:
                    held |= {"index": index}
                for key, tensor in held.items():
                    file.add(f"{key}:{name}", tensor)
                digests = {key: fingerprint(tensor) for key, tensor in held.items()}
                of = {"region": region, "of": list(piece.shape), "base_sha256": piece.fingerprint}
                records[name] = of | record | {"sha256": digests}
                trim_heap()  # sums and low-rank pieces pass through tensors of other sizes
        plain = json.loads(json.dumps(dict(head) | {"tensors": records}))
        text = json.dumps(plain | {"sha256": _digest(plain)}, indent=1) + "\n"
        (aside / JSON).write_text(text, encoding="utf-8")


def _digest(head: Mapping[str, Any]) -> str:
    """SHA-256 of `delta.json` without this sum itself: keys sorted, no spaces."""
    return hashlib.sha256(json.dumps(head, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def refuse_other(folder: Path) -> None:
    """ThriftyError where `folder` exists and is no delta."""
    if folder.exists() and not (folder / JSON).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ThriftyError(f"{folder} exists and is no delta: give another folder, or remove it first")


def read_head(folder: Path) -> dict[str, Any]:
    """`delta.json`, checked for kind and format."""
    path = folder / JSON
    if not path.is_file():
        raise ThriftyError(f"{folder} is no delta folder: it holds no {JSON}")
    try:
        head = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ThriftyError(f"{path} is damaged ({error}): make or copy the delta again") from None
    if not isinstance(head, dict) or head.get("kind") not in ("regions", "peft"):
        raise ThriftyError(f"{path} describes no delta that this version knows")
    if head.get("format") != FORMAT:
        raise ThriftyError(f"{path} has format {head.get('format')!r}, this version reads {FORMAT}: upgrade thrifty")
    found = head.pop("sha256", None)  # older deltas have none
    if found is not None and found != _digest(head):
        raise ThriftyError(f"{path} is not what was saved: make or copy the delta again")
    return head


def read_pieces(folder: Path, head: Mapping[str, Any]) -> LazyPieces[AnyPiece]:
    """The pieces in `folder`, whose `delta.json` is `head`; values are read each time they are asked for. Raises what
    a garbled record leads to."""
    file, records = TensorFile(folder / TENSORS), head["tensors"]

    def read(name: str, key: str) -> Tensor:
        tensor = file[f"{key}:{name}"]
        digests = records[name].get("sha256", {})  # older deltas have none
        if key in digests and fingerprint(tensor) != digests[key]:
            raise ThriftyError(f"{file.path}: {key} of {name} is not what was saved: make or copy the delta again")
        return tensor

    def piece(name: str) -> AnyPiece:
        kind = _kind(records[name], plan[name])
        held = {key: read(name, key) for key in kind.HELD}
        return kind.from_files(records[name], held, region=plan[name], shape=plan.shapes[name])  # type: ignore[arg-type]

    regions: dict[str, Region] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, record in records.items():
        index = read(name, "index") if f"index:{name}" in file else None
        region, shape = region_from_files(record["region"], index), tuple(int(n) for n in record["of"])
        region.check(name, shape)
        if not isinstance(record["base_sha256"], str):
            raise ThriftyError(f"{name}: the delta's fingerprint of the base is no text: it is damaged")
        kind = _kind(record, region)
        outlines = {key: file.outlines[f"{key}:{name}"] for key in kind.HELD}
        kind.check(name, record, outlines, region=region, shape=shape)  # type: ignore[arg-type]
        regions[name], shapes[name] = region, shape
    plan = Plan(regions, shapes=shapes, total=int(head["total"]))
    return LazyPieces(plan, piece)


def _kind(record: Mapping[str, Any], region: Region) -> type[AnyPiece]:
    if "coding" in record:
        return CodedPiece
    return LowRankPiece if isinstance(region, LowRank) else Piece


def nbytes(piece: AnyPiece) -> int:
    """What a piece takes in `delta.safetensors`."""
    _, index = piece.region.to_files()
    held = list(piece.to_files()[1].values()) + ([] if index is None else [index])
    return sum(tensor.nbytes for tensor in held)
