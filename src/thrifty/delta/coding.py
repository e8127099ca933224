"""Numbers in a few bits each: integer codes, packed into bytes, with a scale for each group of numbers.

A number is code x scale. Scales are bfloat16, whose 8 bits times a code's 8 are exact in float32: a decoded number is
the same on every machine. They are rounded up, so that the largest number of a group is always within reach.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ThriftyError
from ..core.low_rank import LowRank
from ..core.region import Region
from ..kernels.low_rank import add_product

__all__ = ["GROUP", "Coding", "Product", "Run", "Values", "coding_from"]

GROUP = 64  # numbers that share a scale: a quarter of a bit for each
_CHUNK = 2**20  # codes at a time; a multiple of 8, so that each chunk ends with a byte
_SHARES = [1.0 - k / 40 for k in range(39)]  # of the scale that reaches the largest number


def _packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes one after the other, `bits` each, the highest bit first."""
    planes = [np.unpackbits(part.numpy()[:, None], axis=1)[:, 8 - bits :] for part in codes.split(_CHUNK)]
    return torch.from_numpy(np.concatenate([np.packbits(part) for part in planes]))


def _unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    step = _CHUNK * bits // 8
    parts = []
    for k, part in enumerate(packed.split(step)):
        here = min(_CHUNK, count - k * _CHUNK)
        planes = np.unpackbits(part.numpy(), count=here * bits).reshape(here, bits)
        parts.append(np.packbits(planes, axis=1)[:, 0] >> (8 - bits))
    return torch.from_numpy(np.concatenate(parts))


def _up(numbers: Tensor) -> Tensor:
    """The next bfloat16 that is not below `numbers` (not negative, float64)."""
    near = numbers.to(torch.bfloat16)
    return torch.where(near.double() < numbers, (near.view(torch.int16) + 1).view(torch.bfloat16), near)


@dataclass(frozen=True)
class Run:
    """`vectors` of `length` numbers, `bits` each; every `group` of a vector share a scale.

    Levels are whole multiples of the scale, from -(2^(bits-1) - 1) to 2^(bits-1) - 1, so that zero stays zero; with
    `halves` they are -(2^bits - 1) / 2 to (2^bits - 1) / 2 in steps of 1, which wastes no code, and the scale is the
    one of the least squared error among 39 shares of the one that reaches the largest number.
    """

    vectors: int
    length: int
    bits: int
    group: int
    halves: bool = False

    @property
    def code_bytes(self) -> int:
        return -(-self.vectors * self.length * self.bits // 8)

    @property
    def scales(self) -> int:
        return self.vectors * -(-self.length // self.group)

    def encode(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Packed codes (uint8) and scales (bfloat16; infinite where a number is too large) of `[vectors, length]`."""
        padded = torch.nn.functional.pad(numbers.double(), (0, -self.length % self.group))
        grouped = padded.view(self.vectors, -1, self.group)
        scale = self._fitted(grouped) if self.halves else self._reaching(grouped)
        codes = self._codes(grouped, scale.double()).to(torch.uint8)
        flat = codes.view(self.vectors, -1)[:, : self.length].flatten()
        return _packed(flat, self.bits), scale.flatten()

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """`[vectors, length]`, float64."""
        flat = _unpacked(codes, self.bits, self.vectors * self.length).double().view(self.vectors, self.length)
        scale = scales.double().view(self.vectors, -1)[:, torch.arange(self.length) // self.group]
        return self._levels(flat).mul_(scale)

    def _levels(self, codes: Tensor) -> Tensor:
        return codes - (2 ** (self.bits - 1) - (0.5 if self.halves else 0.0))

    def _codes(self, numbers: Tensor, scale: Tensor) -> Tensor:
        steps = numbers / torch.where(scale > 0, scale, 1.0)
        if self.halves:
            return (steps.floor() + 2 ** (self.bits - 1)).clamp_(0, 2**self.bits - 1)
        return (steps.round() + 2 ** (self.bits - 1)).clamp_(1, 2**self.bits - 1)

    def _reaching(self, grouped: Tensor) -> Tensor:
        top = (2**self.bits - 1) / 2 if self.halves else 2 ** (self.bits - 1) - 1
        return _up(grouped.abs().amax(dim=-1, keepdim=True) / top)

    def _fitted(self, grouped: Tensor) -> Tensor:
        reaching = self._reaching(grouped)
        best, least = reaching, torch.full(reaching.shape, math.inf, dtype=torch.float64)
        for share in _SHARES:
            scale = _up(reaching.double() * share)
            codes = self._codes(grouped, scale.double())
            error = (grouped - self._levels(codes) * scale.double()).square_().sum(dim=-1, keepdim=True)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best


@dataclass(frozen=True)
class Values:
    """A region's packed changes themselves, in `bits` each."""

    bits: int
    group: int = GROUP
    kind: ClassVar[str] = "values"

    def runs(self, region: Region, shape: Sequence[int]) -> list[Run]:
        return [Run(1, math.prod(region.packed_shape(shape)), self.bits, self.group)]

    def change(self, decoded: Sequence[Tensor], *, region: Region, shape: Sequence[int]) -> Tensor:
        """The packed change of a region, float64, from the numbers of each run."""
        return decoded[0].view(region.packed_shape(shape))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "bits": self.bits, "group": self.group}


@dataclass(frozen=True)
class Product:
    """A matrix (of stacked ones: each) as left times right: `vectors` holds (how many columns of left and rows of
    right, bits of each number), in turn. `group` numbers share a scale; None: each vector has one, fitted, and levels
    are halves."""

    vectors: tuple[tuple[int, int], ...]
    group: int | None = None
    kind: ClassVar[str] = "product"

    @property
    def rank(self) -> int:
        return sum(count for count, _ in self.vectors)

    def runs(self, region: Region, shape: Sequence[int]) -> list[Run]:
        """For each pair in `vectors` one run of the left vectors and one of the right ones."""
        stack = math.prod(shape[:-2])
        return [
            Run(stack * count, int(length), bits, self.group or int(length), halves=self.group is None)
            for count, bits in self.vectors
            for length in shape[-2:]
        ]

    def split(self, left: Tensor, right: Tensor) -> list[Tensor]:
        """The numbers of each run, `[vectors, length]`, of `left` `[..., rows, k]` and `right` `[..., k, columns]`."""
        counts = [count for count, _ in self.vectors]
        lefts, rights = left.mT.split(counts, dim=-2), right.split(counts, dim=-2)
        return [side.reshape(-1, side.shape[-1]) for both in zip(lefts, rights, strict=True) for side in both]

    def factors(self, decoded: Sequence[Tensor], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`left` `[..., rows, k]` and `right` `[..., k, columns]`, float32, from the numbers of each run."""
        stack = tuple(shape[:-2])
        sides = [
            torch.cat([run.float().view(*stack, -1, run.shape[-1]) for run in decoded[first::2]], dim=-2)
            for first in (0, 1)
        ]
        return sides[0].mT.contiguous(), sides[1]

    def change(self, decoded: Sequence[Tensor], *, region: Region, shape: Sequence[int]) -> Tensor:
        """The packed change of a region, float64, from the numbers of each run; outside the region nothing changes,
        whatever the product is there."""
        left, right = self.factors(decoded, shape)
        dense = torch.zeros(tuple(shape))
        scale = region.scale if isinstance(region, LowRank) else 1.0
        if len(shape) == 2:
            dense = add_product(dense, left, right, scale=scale)
        else:
            for k in range(shape[0]):
                dense[k] = add_product(dense[k], left[k], right[k], scale=scale)
        return region.gather(dense).double()

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "vectors": [list(pair) for pair in self.vectors], "group": self.group}


Coding = Values | Product


def coding_from(name: str, record: Any, *, region: Region, shape: Sequence[int]) -> Coding:
    """The coding that `to_dict` described; ThriftyError where it makes no sense for a tensor of `shape`."""
    kind = record.get("kind") if isinstance(record, Mapping) else None
    coding: Coding | None = None
    if kind == Values.kind and not isinstance(region, LowRank):
        coding = _values(record)
    elif kind == Product.kind and len(shape) in (2, 3):
        coding = _product(record)
        if coding is not None and coding.rank > min(shape[-2:]):
            coding = None
        if coding is not None and isinstance(region, LowRank) and coding.rank != region.r:
            coding = None
    if coding is None:
        raise ThriftyError(f"{name}: the delta's coding {str(record)[:80]!r} makes no sense for it: it is damaged")
    return coding


def _within(value: Any, low: int, high: int) -> TypeGuard[int]:
    return type(value) is int and low <= value <= high


def _values(record: Mapping[str, Any]) -> Values | None:
    bits, group = record.get("bits"), record.get("group")
    return Values(bits, group) if _within(bits, 2, 8) and _within(group, 1, 2**31) else None


def _product(record: Mapping[str, Any]) -> Product | None:
    group, pairs = record.get("group"), record.get("vectors")
    least = 1 if group is None else 2  # the only whole level of one bit is zero
    if not (group is None or _within(group, 1, 2**31)) or not isinstance(pairs, list) or not pairs:
        return None
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not _within(pair[0], 1, 2**31):
            return None
        if not _within(pair[1], least, 8):
            return None
    return Product(tuple((count, bits) for count, bits in pairs), group)
