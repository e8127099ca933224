"""Ways to compress a delta, and their text on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..core.budget import share_of
from ..core.errors import ThriftyError, unknown

__all__ = ["DeltaCome", "How", "Quantized", "TopK", "parse_how"]


@dataclass(frozen=True)
class Quantized:
    """Each change (of a low-rank pair: each number of its factors) as an integer of `bits`, 8 or 4, times the scale of
    its group of 64: off by at most half a scale, where the largest change of the group is 127 or 7 scales."""

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ThriftyError(f"int{self.bits} is not known: give int8 or int4")

    def __str__(self) -> str:
        return f"int{self.bits}"


@dataclass(frozen=True)
class TopK:
    """The largest changes of the whole delta, exact; all others are dropped. `share`: of its numbers, in (0, 1]."""

    share: float

    def __post_init__(self) -> None:
        share_of(self.share, key="top_k")

    def __str__(self) -> str:
        return f"top_k={100 * self.share:g}%"


@dataclass(frozen=True)
class DeltaCome:
    """Delta-CoMe: the singular vectors of each matrix's change in groups of falling precision, the rest dropped.

    vectors: (how many, bits of each number) in turn; a matrix that has fewer takes what it has. at_most: stop where the
    codes of a matrix would take more than this share of its changed numbers at 16 bits.

    Source: Ping et al. 2024, "Delta-CoMe: Training-Free Delta-Compression with Mixed-Precision for Large Language
    Models", read as its abstract and the authors' script: 2 vectors at 8 bits, 32 at 3, then 2 bits up to 1/16 (the
    text `delta_come` alone). Left out: the paper rounds by GPTQ on calibration data; here each vector is rounded to the
    nearest of 2^bits evenly spaced levels, with the scale of least squared error. Singular values are shared out
    evenly between both sides. Stacked matrices are taken one by one; tensors of one axis stay exact. Not for sparse
    changes: where no vector fits, use int4.
    """

    vectors: tuple[tuple[int, int], ...] = ((2, 8), (32, 3), (1024, 2))
    at_most: float | None = None

    def __post_init__(self) -> None:
        for count, bits in self.vectors:
            if count < 1 or not 1 <= bits <= 8:
                raise ThriftyError(f"delta_come: {count}x{bits} is not valid: give at least 1 vector, of 1 to 8 bits")
        if not self.vectors:
            raise ThriftyError("delta_come: no vectors are given: give them as in 2x8,32x3,512x2")
        if self.at_most is not None:
            share_of(self.at_most, key="delta_come")

    def __str__(self) -> str:
        groups = ",".join(f"{count}x{bits}" for count, bits in self.vectors)
        return f"delta_come={groups}" + (f",{100 * self.at_most:g}%" if self.at_most is not None else "")


How = Quantized | TopK | DeltaCome


def parse_how(text: str) -> How:
    """`int8`, `int4`, `top_k=10%`, `delta_come`, `delta_come=2x8,32x3,512x2` or `delta_come=2x8,32x3,512x2,6.25%`.
    ThriftyError where it is none of them."""
    name, equals, value = (part.strip() for part in text.partition("="))
    name = name.lower().replace("-", "_")
    if name in ("int8", "int4"):
        if equals:
            raise ThriftyError(f"{name} takes no value, but {value!r} is given: write {name}")
        return Quantized(int(name[3:]))
    if name == "top_k":
        return TopK(share_of(value, key="top_k"))
    if name != "delta_come":
        raise ThriftyError(unknown("compression", name, ["int8", "int4", "top_k", "delta_come"]))
    if not equals:
        return DeltaCome(at_most=1 / 16)
    *groups, last = value.split(",")
    ceiling = share_of(last, key="delta_come") if last.strip().endswith("%") else None
    return DeltaCome(tuple(_group(part) for part in (groups if ceiling is not None else [*groups, last])), ceiling)


def _group(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"\s*(\d{1,9})x(\d)\s*", text)
    if found is None:
        raise ThriftyError(f"delta_come: {text!r} is not <vectors>x<bits>: write it as in delta_come=2x8,32x3,512x2")
    return int(found[1]), int(found[2])
