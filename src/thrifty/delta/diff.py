"""The difference of two checkpoints of one architecture as a delta: each tensor in the smallest form that holds it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..core.entries import Entries
from ..core.errors import ThriftyError, nearest
from ..core.low_rank import LowRank
from ..core.plan import Plan
from ..core.region import Blocks, Region, Whole
from .delta import Delta
from .digest import bits
from .files import AnyPiece
from .low_rank import LowRankPiece
from .piece import LazyPieces, Piece

__all__ = ["diff", "low_rank_factors", "region_of"]

_SIDES = (8, 16, 32, 64, 128, 256)


def diff(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], *, error: float = 0.0) -> Delta:
    """The delta that makes `tuned` of `base`.

    base, tuned: tensors by parameter name; each is asked for one at a time, and again when its piece is made, so pass
    copies of a model that may change meanwhile. error: how far a matrix may be off, as a share of its change (Frobenius
    norm); above 0 a matrix becomes a low-rank pair of the least rank that keeps to it, where that is smaller than the
    exact form. ThriftyError where a tensor is missing, or has another shape or dtype.
    """
    if not 0 <= error < 1:
        raise ThriftyError(f"error {error:g} is not valid: give a share of the change from 0 (exact) to below 1")
    for name in tuned:
        if name not in base:
            close = nearest(name, base)
            raise ThriftyError(f"the base has no tensor {name}" + (f" (nearest: {close})" if close else ""))
    regions: dict[str, Region] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    total = 0
    for name in base:
        if name not in tuned:
            raise ThriftyError(f"the tuned model has no tensor {name}: give two checkpoints of one architecture")
        before, after = base[name], tuned[name]
        if before.shape != after.shape or before.dtype != after.dtype:
            raise ThriftyError(
                f"{name} is {before.dtype} {tuple(before.shape)} in the base and {after.dtype} {tuple(after.shape)} in "
                "the tuned model: give two checkpoints of one architecture in one dtype"
            )
        total += before.numel()
        changed = bits(before) != bits(after)
        if not before.dtype.is_floating_point or not bool(changed.any()):
            continue
        region = region_of(changed, itemsize=before.dtype.itemsize)
        if error and before.ndim == 2:
            region = _pair_if_smaller(before, after, region, error=error)
        regions[name], shapes[name] = region, tuple(before.shape)

    def piece(name: str) -> AnyPiece:
        before, after, region = base[name], tuned[name], regions[name]
        if not isinstance(region, LowRank):
            return Piece.of(before, after, region)
        left, right = low_rank_factors(after.double() - before.double(), rank=region.r)
        return LowRankPiece.of(before, left, right, region=region)

    if not regions:
        raise ThriftyError("the two models are equal: there is no difference to write")
    method = {"diff": {"error": error} if error else {}}
    return Delta(LazyPieces(Plan(regions, shapes=shapes, total=total), piece), method=method, total=total)


def region_of(changed: Tensor, *, itemsize: int) -> Region:
    """The region that takes the fewest bytes in a delta and holds all of `changed` (bool, of a tensor's shape): whole
    rows, whole columns, blocks (of the sides that the changes themselves suggest, or powers of two), entries, or the
    whole tensor."""
    best: Region = Whole()
    least = 2 * changed.numel() * itemsize
    for region, index_bytes in _candidates(changed):
        cost = 2 * region.size(changed.shape) * itemsize + index_bytes
        if cost < least:
            best, least = region, cost
    return best


def _candidates(changed: Tensor) -> Iterator[tuple[Region, int]]:
    count = int(changed.sum())
    wide = 8 if changed.numel() > 2**31 else 4
    if changed.ndim in (2, 3) and changed.numel():
        rows, columns = int(changed.shape[-2]), int(changed.shape[-1])
        sides = [(1, columns), (rows, 1), *((min(s, rows), min(s, columns)) for s in _SIDES), _own_sides(changed)]
        for h, w in dict.fromkeys(sides):
            touched = _touched(changed, h, w)
            yield Blocks((h, w), touched.nonzero()), 4 * changed.ndim * int(touched.sum())
    yield Entries(changed.flatten().nonzero()[:, 0]), wide * count


def _touched(changed: Tensor, h: int, w: int) -> Tensor:
    """Which blocks of `h` x `w` hold a change: bool `[..., rows / h, columns / w]`, rounded up."""
    rows, columns = changed.shape[-2:]
    padded = torch.nn.functional.pad(changed, (0, -columns % w, 0, -rows % h))
    return padded.unflatten(-1, (-1, w)).unflatten(-3, (-1, h)).any(-1).any(-2)


def _own_sides(changed: Tensor) -> tuple[int, int]:
    """The largest block size on whose grid every change of rows, and of columns, begins and ends."""
    return _step(changed, dim=-2), _step(changed, dim=-1)


def _step(changed: Tensor, *, dim: int) -> int:
    size = changed.shape[dim]
    if size == 1:
        return 1
    differs = changed.narrow(dim, 1, size - 1) != changed.narrow(dim, 0, size - 1)
    others = [d for d in range(changed.ndim) if d != dim % changed.ndim]
    edges = differs.any(dim=others).nonzero()[:, 0] + 1
    return math.gcd(*edges.tolist()) or size


def _pair_if_smaller(before: Tensor, after: Tensor, region: Region, *, error: float) -> Region:
    values = torch.linalg.svdvals((after.double() - before.double()).float()).double()
    left_over = (values.square().flip(0).cumsum(0).flip(0) / values.square().sum()).sqrt()  # with the first k left out
    rank = max(1, int((left_over > error).sum()))
    pair = LowRank(rank, float(rank))
    # factors in float32, and what takes them back exactly: about a third of a bit for each number
    cost = 4 * pair.size(before.shape) + before.numel() // 24
    return pair if cost < 2 * region.size(before.shape) * before.dtype.itemsize else region


def low_rank_factors(change: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product of `left` `[..., rows, rank]` and `right` `[..., rank, columns]` (float32) to each matrix of
    `change`; the singular values are shared out evenly."""
    u, s, v = torch.linalg.svd(change.float(), full_matrices=False)
    root = s[..., :rank].sqrt()
    return (u[..., :rank] * root[..., None, :]).contiguous(), (root[..., None] * v[..., :rank, :]).contiguous()
