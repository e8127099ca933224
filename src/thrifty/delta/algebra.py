"""Deltas as vectors: sums, averages, one on top of another, and the same change on another base.

A result is made tensor by tensor when it is asked for (applied, saved), so that one tensor is in memory. Sums are taken
in float64 and rounded once to the tensor's dtype. Low-rank pairs stay pairs where they can; their sums, and those of
compressed pieces, need the base's values, which neither hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..core.entries import union
from ..core.errors import ThriftyError
from ..core.low_rank import LowRank
from ..core.plan import Plan
from ..core.region import EveryNumber, Region, Whole
from .coded import CodedPiece
from .delta import Delta
from .digest import fingerprint
from .files import AnyPiece
from .low_rank import LowRankPiece
from .piece import LazyPieces, Piece
from .vocabulary import NewTokens

__all__ = ["average", "combine", "dense_change", "model_stock", "stack", "transfer"]

Base = Mapping[str, Tensor]


def combine(terms: Sequence[tuple[Delta, float]], *, base: Base | None = None) -> Delta:
    """base + the sum of weight x change: adding, scaling, interpolating.

    terms: deltas of one base with a weight each. base: the base's tensors by name, where the deltas hold low-rank pairs
    or compressed pieces that do not stay as they are. ThriftyError where two deltas are of different bases.
    """
    return _combined(terms, lambda name, present: [weight for _, weight in present], base=base, what="sum")


def average(deltas: Sequence[Delta], *, weights: Sequence[float] | None = None, base: Base | None = None) -> Delta:
    """The mean of the changes, or their mean with `weights` (which are divided by their sum)."""
    weights = [1.0] * len(deltas) if weights is None else list(weights)
    if len(weights) != len(deltas) or not deltas or not sum(weights):
        raise ThriftyError(f"{len(weights)} weights for {len(deltas)} deltas: give each a weight, their sum not 0")
    return combine([(d, w / sum(weights)) for d, w in zip(deltas, weights, strict=True)], base=base)


def model_stock(one: Delta, other: Delta, *, base: Base | None = None) -> Delta:
    """Two fine-tunes of one base, drawn towards it (Jang et al. 2024, "Model Stock", equation 3 for two models): for
    each tensor, t times the mean of both with t = 2 cos / (1 + cos), where cos is that of the angle between the two
    changes; where it is not above 0, the base itself."""

    def weights(name: str, present: Sequence[tuple[AnyPiece, float]]) -> list[float]:
        if len(present) < 2:
            return [0.0] * len(present)  # the other did not move: a right angle
        a, b = (dense_change(piece) for piece, _ in present)
        cosine = float((a * b).sum() / (a.norm() * b.norm()).clamp_min(torch.finfo(a.dtype).tiny))
        return [max(0.0, cosine / (1 + cosine)) if cosine > -1 else 0.0] * 2

    return _combined([(one, 1.0), (other, 1.0)], weights, base=base, what="model stock")


def _combined(
    terms: Sequence[tuple[Delta, float]],
    weights: Callable[[str, Sequence[tuple[AnyPiece, float]]], Sequence[float]],
    *,
    base: Base | None,
    what: str,
) -> Delta:
    for _, weight in terms:
        if not math.isfinite(weight):
            raise ThriftyError(f"weight {weight} is not valid: give a finite number")
    deltas = [delta for delta, _ in terms]
    plans = [_plan(delta) for delta in deltas]
    regions: dict[str, Region] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in dict.fromkeys(name for plan in plans for name in plan):
        here = [plan for plan in plans if name in plan]
        shapes[name] = here[0].shapes[name]
        if any(plan.shapes[name] != shapes[name] for plan in here):
            raise ThriftyError(f"{name} has other shapes in other deltas: they are not of one base")
        regions[name] = _union([plan[name] for plan in here], shapes[name])

    def piece(name: str) -> AnyPiece:
        present = [(delta.pieces[name], weight) for delta, weight in terms if name in delta.pieces]
        _one_base(name, [piece for piece, _ in present])
        moved = list(zip((p for p, _ in present), weights(name, present), strict=True))
        return _sum(name, moved, regions[name], base)

    method = {what: [{"weight": weight, "method": dict(delta.method)} for delta, weight in terms]}
    return Delta(
        LazyPieces(Plan(regions, shapes=shapes, total=_total(deltas)), piece),
        method=method,
        total=_total(deltas),
        new_tokens=_tokens(deltas),
    )


def _sum(name: str, terms: Sequence[tuple[AnyPiece, float]], region: Region, base: Base | None) -> AnyPiece:
    first = terms[0][0]
    if len(terms) == 1 and terms[0][1] == 1.0 and first.region == region:
        return first
    if isinstance(region, LowRank):
        pairs = [(*p.factors(), w) for p, w in terms if not isinstance(p, Piece)]
        left = torch.cat([left * (w / region.scale) for left, _, w in pairs], dim=1)
        right = torch.cat([right for _, right, _ in pairs])
        return LowRankPiece.of(_base_tensor(name, first, base), left, right, region=region)
    total, original = torch.zeros(first.shape, dtype=torch.float64), torch.zeros(first.shape, dtype=first.dtype)
    for piece, weight in terms:
        total.add_(dense_change(piece), alpha=weight)
        if isinstance(piece, Piece):
            piece.region.scatter_(original, piece.original)
    if not all(isinstance(piece, Piece) for piece, _ in terms):
        original = _base_tensor(name, first, base)
    kept = region.gather(original)
    values = region.gather(total).add_(kept).to(first.dtype)
    return Piece(region, first.shape, values, kept, first.fingerprint)


def stack(first: Delta, second: Delta, *, base: Base | None = None) -> Delta:
    """One delta that does what `first` and then `second` do, where `second` was trained on top of `first`. Exact.

    base: the base's tensors by name, needed where one of two pieces of a tensor is a low-rank pair or compressed."""
    plans = [_plan(first), _plan(second)]
    names = dict.fromkeys([*plans[0], *plans[1]])
    regions: dict[str, Region] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        here = [plan for plan in plans if name in plan]
        shapes[name] = here[-1].shapes[name]
        if here[0].shapes[name] != shapes[name]:
            raise ThriftyError(f"{name} has another shape in the second delta: it was not trained on top of the first")
        found = [plan[name] for plan in here]
        pairs = any(isinstance(region, LowRank) for region in found)
        regions[name] = Whole() if pairs and len(found) > 1 else _union(found, shapes[name])

    def piece(name: str) -> AnyPiece:
        below, above = first.pieces.get(name), second.pieces.get(name)
        if below is None or above is None:
            only = below or above
            assert only is not None
            return only
        if isinstance(below, Piece) and isinstance(above, Piece):
            between, start = torch.zeros(below.shape, dtype=below.dtype), torch.zeros(below.shape, dtype=below.dtype)
            above.region.scatter_(between, above.original)
            expected = below.region.gather(between)
            inside = below.region.gather(above.region.mask(below.shape))
            if not torch.equal(expected[inside], below.values.view_as(expected)[inside]):
                raise ThriftyError(f"{name}: the second delta does not start where the first one ends")
            start.copy_(between)
            below.write_(between)
            above.write_(between)
            below.region.scatter_(start, below.original)
            region = regions[name]
            return Piece(region, below.shape, region.gather(between), region.gather(start), below.fingerprint)
        untouched = _base_tensor(name, below, base)
        trained = untouched.clone()
        below.write_(trained)
        if fingerprint(trained) != above.fingerprint:
            raise ThriftyError(f"{name}: the second delta does not start where the first one ends")
        above.write_(trained)
        return Piece.of(untouched, trained, regions[name])

    return Delta(
        LazyPieces(Plan(regions, shapes=shapes, total=first.total), piece),
        method={"stack": [dict(first.method), dict(second.method)]},
        total=first.total,
        info=dict(second.info),
        new_tokens=_tokens([first, second]),
    )


def transfer(delta: Delta, base: Base) -> Delta:
    """The same change on another base of the same shapes (a newer version of the model): W2 + (trained - W1), rounded
    once. ThriftyError where a tensor is missing or has another shape."""
    plan = _plan(delta)
    for name in plan:
        if name not in base or tuple(base[name].shape) != plan.shapes[name]:
            found = f"has shape {tuple(base[name].shape)}" if name in base else "is missing"
            raise ThriftyError(f"{name} {found} in the other base, {plan.shapes[name]} is needed: another architecture")

    def piece(name: str) -> AnyPiece:
        old, tensor = delta.pieces[name], base[name].detach().cpu()
        if isinstance(old, LowRankPiece):
            return LowRankPiece.of(tensor.to(old.dtype), old.left, old.right, region=old.region)
        tensor = tensor.to(old.dtype)
        if isinstance(old, CodedPiece):
            return old.on(name, tensor)
        original = old.region.gather(tensor)
        values = (original.double() + old.change().view_as(original)).to(old.dtype)
        return Piece(old.region, old.shape, values, original, fingerprint(tensor))

    return Delta(
        LazyPieces(plan, piece),
        method={"transfer": dict(delta.method)},
        total=delta.total,
        info=dict(delta.info),
        new_tokens=delta.new_tokens,
    )


def _plan(delta: Delta) -> Plan:
    if not delta.pieces:
        raise ThriftyError("this delta holds no regions (a PEFT adapter, or nothing changed): convert it first")
    return delta.plan


def _union(regions: Sequence[Region], shape: tuple[int, ...]) -> Region:
    pairs = [region for region in regions if isinstance(region, LowRank)]
    if not pairs:
        return reduce(lambda a, b: union(a, b, shape), regions)
    rank = sum(region.r for region in pairs)
    if len(pairs) < len(regions) or rank > min(shape):
        return Whole()
    return pairs[0] if len(pairs) == 1 else LowRank(rank, float(rank))


def dense_change(piece: AnyPiece) -> Tensor:
    """float64, zero outside the region."""
    if isinstance(piece.region, EveryNumber):
        return piece.change().view(piece.shape)
    dense = torch.zeros(piece.shape, dtype=torch.float64)
    piece.region.scatter_(dense, piece.change())
    return dense


def _base_tensor(name: str, piece: AnyPiece, base: Base | None) -> Tensor:
    if base is None or name not in base:
        raise ThriftyError(
            f"{name} was changed by a low-rank pair or is compressed, which needs the base: give the base model "
            "(--base)"
        )
    tensor = base[name].detach().to("cpu", piece.dtype)
    if fingerprint(tensor) != piece.fingerprint:
        raise ThriftyError(f"{name} differs from the base of this delta: another base, or a changed one")
    return tensor


def _one_base(name: str, pieces: Sequence[AnyPiece]) -> None:
    if len({(piece.fingerprint, piece.dtype) for piece in pieces}) > 1:
        raise ThriftyError(f"{name} differs in the bases of these deltas: only deltas of one base can be combined")


def _total(deltas: Sequence[Delta]) -> int:
    if len({delta.total for delta in deltas}) > 1:
        raise ThriftyError(
            "these deltas are of models with different numbers of parameters: not of one base, or one of them added "
            "tokens"
        )
    return deltas[0].total


def _tokens(deltas: Sequence[Delta]) -> NewTokens | None:
    found: list[Any] = [delta.new_tokens for delta in deltas if delta.new_tokens is not None]
    if any(tokens != found[0] for tokens in found):
        raise ThriftyError("these deltas added different tokens to the vocabulary: they cannot be combined")
    return found[0] if found else None
