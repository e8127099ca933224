"""Deltas made smaller, at a measured loss: fewer bits, fewer numbers, or few singular vectors in mixed precision.

Whatever is lost of the change, the base is not: a compressed delta is removed bit for bit like any other. What takes
the base back (`back`) is part of its size, and grows with the change: for changes as large as a tenth of the weights it
can exceed what few bits keep of the change itself. `measure` counts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import ThriftyError
from ..core.low_rank import LowRank
from ..core.plan import Plan
from ..core.region import Region
from .algebra import Base, _base_tensor, _plan, dense_change
from .coded import CodedPiece
from .coding import GROUP, Coding, Product, Values
from .delta import Delta
from .diff import low_rank_factors
from .files import AnyPiece, nbytes
from .how import DeltaCome, How, Quantized, TopK, parse_how
from .piece import LazyPieces, Piece
from .prune import finite, pruned

__all__ = ["Loss", "Report", "compress", "measure"]


def compress(delta: Delta, how: How | str, *, base: Base | None = None) -> Delta:
    """`delta` in fewer bytes, by `how` (or its text, see `parse_how`); `measure` says what that cost.

    Tensors are compressed one by one each time they are asked for, so that one is in memory: save the result and load
    it before you apply it. A tensor that would not become smaller stays exact, as do those with rows of new tokens.
    base: the base's tensors by name, where the delta holds low-rank pairs or is compressed already. ThriftyError where
    it is needed, where a change is not finite, or where nothing can be compressed in this way.
    """
    how = parse_how(how) if isinstance(how, str) else how
    plan = _plan(delta)
    new = delta.new_tokens  # growing a model fills its new rows from originals, which only exact pieces hold
    names = [name for name in plan if new is None or plan.shapes[name][:1] != (new.rows,)]
    if not names:
        raise ThriftyError(
            "this delta changes only tensors with rows of new tokens, which stay exact: nothing to compress"
        )
    if isinstance(how, TopK):
        regions, piece = pruned(delta, names, share=how.share, base=base)
    else:
        regions, piece = _coded(delta, names, how=how, base=base)
    exact = {name: plan[name] for name in plan if name not in set(names)}
    regions = {name: region for name in plan if (region := (regions | exact).get(name)) is not None}
    return Delta(
        LazyPieces(
            Plan(regions, shapes=plan.shapes, total=delta.total),
            lambda name: delta.pieces[name] if name in exact else piece(name),
        ),
        method={"compress": {"how": str(how), "method": dict(delta.method)}},
        total=delta.total,
        info=dict(delta.info),
        new_tokens=new,
    )


Made = tuple[dict[str, Region], Callable[[str], AnyPiece]]  # the regions, and what makes the piece of a name


def _coded(delta: Delta, names: Sequence[str], *, how: Quantized | DeltaCome, base: Base | None) -> Made:
    plan = _plan(delta)
    codings = {name: _coding(how, plan[name], plan.shapes[name]) for name in names}
    regions = {name: plan[name] for name in names}
    for name, coding in codings.items():
        if isinstance(plan[name], LowRank) and isinstance(coding, Product):
            regions[name] = LowRank(coding.rank, float(coding.rank))  # with the scale in its factors
    if all(coding is None for coding in codings.values()):
        raise ThriftyError(f"no tensor of this delta is a matrix with room for a vector of {how}: use int4 or top_k")

    def piece(name: str) -> AnyPiece:
        old, coding, region = delta.pieces[name], codings[name], regions[name]
        if coding is None:
            return old
        new = _code(name, old, coding=coding, region=region, base=base)
        return new if isinstance(region, LowRank) or nbytes(new) < nbytes(old) else old

    return regions, piece


def _coding(how: Quantized | DeltaCome, region: Region, shape: tuple[int, ...]) -> Coding | None:
    """How a tensor is coded; None where it cannot be."""
    if isinstance(how, Quantized):
        return Product(((region.r, how.bits),), GROUP) if isinstance(region, LowRank) else Values(how.bits)
    if len(shape) not in (2, 3):
        return None
    vectors = min(*shape[-2:], region.r if isinstance(region, LowRank) else math.inf)
    room = math.inf if how.at_most is None else how.at_most * 16 * region.size(shape) / math.prod(shape[:-2])
    found = []
    for wanted, bits in how.vectors:
        cost = bits * sum(shape[-2:]) + 2 * 16  # with both scales
        count = int(min(wanted, vectors, room / cost))
        if count:
            found.append((count, bits))
        if count < wanted:
            break
        vectors, room = vectors - count, room - count * cost
    return Product(tuple(found)) if found else None


def _code(name: str, old: AnyPiece, *, coding: Coding, region: Region, base: Base | None) -> CodedPiece:
    original = old.original if isinstance(old, Piece) else old.region.gather(_base_tensor(name, old, base))
    if isinstance(coding, Values):
        numbers = [finite(name, old.change()).reshape(1, -1)]
    elif coding.group is not None:
        assert not isinstance(old, Piece)
        left, right = (finite(name, side) for side in old.factors())
        numbers = coding.split(left, right)
    else:
        dense = finite(name, dense_change(old))
        peak = float(dense.abs().max()) or 1.0  # float32 holds no squares of very small or large numbers
        left, right = low_rank_factors(dense / peak, rank=coding.rank)
        numbers = coding.split(left.double() * math.sqrt(peak), right.double() * math.sqrt(peak))
    return CodedPiece.of(
        name,
        numbers,
        coding=coding,
        original=original,
        region=region,
        shape=old.shape,
        fingerprint=old.fingerprint,
    )


@dataclass(frozen=True)
class Loss:
    """`error`: how far the change is off, over the change (Frobenius norms); bytes in `delta.safetensors`."""

    error: float
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return f"{self.bytes_before:,} -> {self.bytes_after:,} bytes, {100 * self.error:.3g}% of the change lost"


@dataclass(frozen=True)
class Report:
    """What a compression cost, by parameter name and in all."""

    tensors: Mapping[str, Loss]
    total: Loss

    def __str__(self) -> str:
        return "\n".join([f"in all: {self.total}", *(f"{name}: {loss}" for name, loss in self.tensors.items())])


def measure(before: Delta, after: Delta) -> Report:
    """What `after`, made of `before` (by `compress`), lost and saved. Reads both, a tensor at a time."""
    lost_of_all, of_all = 0.0, 0.0
    tensors = {}
    for name, old in before.pieces.items():
        new = after.pieces.get(name)
        change = dense_change(old)
        off = change if new is None else change - dense_change(new)
        scale = float(change.abs().max()) or 1.0  # no square of it leaves float64
        lost, whole = float((off / scale).norm()) * scale, float((change / scale).norm()) * scale
        lost_of_all, of_all = math.hypot(lost_of_all, lost), math.hypot(of_all, whole)
        tensors[name] = Loss(lost / whole if whole else 0.0, nbytes(old), 0 if new is None else nbytes(new))
    error = lost_of_all / of_all if of_all else 0.0
    sizes = sum(loss.bytes_before for loss in tensors.values()), sum(loss.bytes_after for loss in tensors.values())
    return Report(tensors, Loss(error, *sizes))
