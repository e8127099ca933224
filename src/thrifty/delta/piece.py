"""What changed in one tensor: its region, with the values after and before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..core.errors import ThriftyError
from ..core.plan import Plan
from ..core.region import Region
from ..core.tensor_file import Outline
from .digest import fingerprint

__all__ = ["LazyPieces", "Piece"]


P = TypeVar("P", covariant=True)


@dataclass(frozen=True)
class Piece:
    """What changed in one tensor: packed values after and before, in the tensor's dtype, on the CPU."""

    region: Region
    shape: tuple[int, ...]
    values: Tensor
    original: Tensor
    fingerprint: str  # of the whole base tensor
    HELD: ClassVar[tuple[str, ...]] = ("values", "base")  # in a file, beside the region's index

    @classmethod
    def of(cls, base: Tensor, trained: Tensor, region: Region) -> Piece:
        """The piece that makes `trained` of `base` in `region`."""
        values, original = region.gather(trained).cpu(), region.gather(base).cpu()
        return cls(region, tuple(base.shape), values, original, fingerprint(base))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def write_(self, tensor: Tensor) -> None:
        """Write the trained values into the base `tensor`."""
        self.region.scatter_(tensor.data, self.values)

    def base_of(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` with the original values in the region."""
        base = tensor.detach().clone()
        self.region.scatter_(base, self.original)
        return base

    def change(self) -> Tensor:
        """How far the packed values moved, float64."""
        return self.values.double().sub_(self.original)

    def to_files(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file needs to hold: a JSON record, and tensors by what they are."""
        return {}, {"values": self.values, "base": self.original}

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
        values, original, size = outlines["values"], outlines["base"], region.size(shape)
        if values.numel != size or original.numel != size or values.dtype != original.dtype:
            raise ThriftyError(
                f"{name}: the delta holds {values.numel:,} values for a region of {size:,}: it is damaged"
            )
        if not values.dtype.is_floating_point:
            raise ThriftyError(f"{name}: the delta holds {values.dtype}, not floating-point values: it is damaged")

    @classmethod
    def from_files(
        cls, record: Mapping[str, Any], held: Mapping[str, Tensor], *, region: Region, shape: tuple[int, ...]
    ) -> Piece:
        """The piece that `to_files` described."""
        return cls(region, shape, held["values"], held["base"], record["base_sha256"])


class LazyPieces(Mapping[str, P]):
    """Parameter name -> its piece, made each time it is asked for: one is in memory. `plan` says what changed."""

    def __init__(self, plan: Plan, make: Callable[[str], P]) -> None:
        self.plan, self._make = plan, make

    def __getitem__(self, name: str) -> P:
        if name not in self.plan:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self.plan  # without making the piece

    def __iter__(self) -> Iterator[str]:
        return iter(self.plan)

    def __len__(self) -> int:
        return len(self.plan)
