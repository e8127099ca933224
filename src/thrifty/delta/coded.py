"""What changed in one tensor, in fewer bits: a compressed change, and what takes the base back exactly.

The tensor becomes base + decoded change, rounded once. Both ways are element-wise float64 arithmetic on the CPU, with
the same bits on every machine; products are summed by `kernels/low_rank.py`. The originals are not held: subtracting
the change gives them back but for a few numbers (`back.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.errors import ThriftyError
from ..core.low_rank import LowRank
from ..core.region import Region
from ..core.tensor_file import Outline
from .back import floating_dtype, pack_back, unpack_back
from .coding import Coding, Product, coding_from
from .digest import fingerprint

__all__ = ["CodedPiece"]


@dataclass(frozen=True)
class CodedPiece:
    """`codes` uint8 and `scales` bfloat16, as `coding` orders them; `back`: uint8, compressed. All flat, on the CPU."""

    region: Region
    shape: tuple[int, ...]
    dtype: torch.dtype
    coding: Coding
    codes: Tensor
    scales: Tensor
    back: Tensor
    fingerprint: str  # of the whole base tensor
    HELD: ClassVar[tuple[str, ...]] = ("codes", "scales", "back")

    @classmethod
    def of(
        cls,
        name: str,
        numbers: Sequence[Tensor],
        *,
        coding: Coding,
        original: Tensor,
        region: Region,
        shape: tuple[int, ...],
        fingerprint: str,
    ) -> CodedPiece:
        """Encode `numbers`, one `[vectors, length]` for each run of `coding`. original: the base's values in the
        region, packed. ThriftyError where they, or what comes of them, are beyond what the types hold."""
        parts = [run.encode(found) for run, found in zip(coding.runs(region, shape), numbers, strict=True)]
        codes, scales = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        if not bool(scales.isfinite().all()):
            raise ThriftyError(f"{name} changes by more than a scale in bfloat16 holds: it cannot be compressed")
        empty = torch.empty(0, dtype=torch.uint8)
        piece = cls(region, shape, original.dtype, coding, codes, scales, empty, fingerprint)
        return piece._with_back(name, original)

    def _with_back(self, name: str, original: Tensor) -> CodedPiece:
        change = self.change()
        trained = _moved(original, change)
        if not bool(trained.isfinite().all()):
            raise ThriftyError(f"{name}: base + compressed change is not finite in {self.dtype}: it cannot be applied")
        return replace(self, back=pack_back(original, _moved(trained, -change), level=9))

    def on(self, name: str, base: Tensor) -> CodedPiece:
        """The same change of another `base` of the same shape and dtype."""
        return replace(self, fingerprint=fingerprint(base))._with_back(name, self.region.gather(base).cpu())

    def _decoded(self) -> list[Tensor]:
        runs = self.coding.runs(self.region, self.shape)
        codes = self.codes.split([run.code_bytes for run in runs])
        scales = self.scales.split([run.scales for run in runs])
        return [run.decode(c, s) for run, c, s in zip(runs, codes, scales, strict=True)]

    def change(self) -> Tensor:
        """How far the packed values move, float64."""
        return self.coding.change(self._decoded(), region=self.region, shape=self.shape)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Of a low-rank pair: left `[rows, r]`, with the scale in it, and right `[r, columns]`, float32; their product
        is the change."""
        assert isinstance(self.coding, Product)
        assert isinstance(self.region, LowRank)
        left, right = self.coding.factors(self._decoded(), self.shape)
        return left * self.region.scale, right

    def write_(self, tensor: Tensor) -> None:
        """Turn the base `tensor` into the trained one."""
        packed = self.region.gather(tensor).cpu()
        self.region.scatter_(tensor.data, _moved(packed, self.change()))

    def base_of(self, tensor: Tensor) -> Tensor:
        """The base of the trained `tensor`."""
        base = tensor.detach().clone()
        guess = _moved(self.region.gather(base).cpu(), -self.change())
        self.region.scatter_(base, unpack_back(self.back, guess))
        return base

    def to_files(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file needs to hold: a JSON record, and tensors by what they are."""
        record = {"dtype": str(self.dtype).removeprefix("torch."), "coding": self.coding.to_dict()}
        return record, {"codes": self.codes, "scales": self.scales, "back": self.back}

    @classmethod
    def check(
        cls,
        name: str,
        record: Mapping[str, Any],
        outlines: Mapping[str, Outline],
        *,
        region: Region,
        shape: tuple[int, ...],
    ) -> None:
        """ThriftyError where a file's record and the outlines of what it holds make no sense; nothing is read."""
        coding = coding_from(name, record["coding"], region=region, shape=shape)
        floating_dtype(name, record)
        runs = coding.runs(region, shape)
        expected = {"codes": sum(run.code_bytes for run in runs), "scales": sum(run.scales for run in runs)}
        types = {"codes": torch.uint8, "scales": torch.bfloat16, "back": torch.uint8}
        for key, outline in outlines.items():
            size = expected.get(key, outline.numel)
            if outline.shape != (size,) or outline.dtype != types[key]:
                raise ThriftyError(
                    f"{name}: the delta's {key} are {outline.dtype} {outline.shape}, not {types[key]} {(size,)}: "
                    "it is damaged"
                )

    @classmethod
    def from_files(
        cls, record: Mapping[str, Any], held: Mapping[str, Tensor], *, region: Region, shape: tuple[int, ...]
    ) -> CodedPiece:
        """The piece that `to_files` described; ThriftyError where a scale is no number."""
        coding = coding_from("the file", record["coding"], region=region, shape=shape)
        if not bool(held["scales"].isfinite().all()):
            raise ThriftyError("this delta is damaged: a scale of its codes is not finite; make or copy it again")
        dtype = getattr(torch, record["dtype"])
        codes, scales, back = (held[key] for key in cls.HELD)
        return cls(region, shape, dtype, coding, codes, scales, back, record["base_sha256"])


def _moved(packed: Tensor, change: Tensor) -> Tensor:
    return (packed.double() + change).to(packed.dtype)
