"""Bases and deltas of every kind of region, and the proof that one is exact both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thrifty.core.entries import Entries
from thrifty.core.low_rank import LowRank
from thrifty.core.region import Blocks, Region, Whole
from thrifty.delta import Delta, LowRankPiece, Piece

__all__ = ["KINDS", "bits", "change_of", "dense", "exact_both_ways", "holder", "one", "some"]

KINDS = ["blocks", "rows", "columns", "entries", "whole", "low_rank", "stacked", "stacked whole"]


def holder(**tensors: Tensor) -> nn.Module:
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_parameter(name, nn.Parameter(tensor.clone()))
    return model


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def some(grid: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Half of the places of a grid, and the last one, where ragged edges meet."""
    chosen = torch.rand(grid, generator=generator) < 0.5
    chosen[tuple(n - 1 for n in grid)] = True
    return chosen.nonzero()


def region_of_kind(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Region:
    rows, columns = shape[-2:]
    if kind in ("blocks", "stacked"):
        return Blocks((3, 4), some((*shape[:-2], -(-rows // 3), -(-columns // 4)), generator))
    if kind == "rows":
        return Blocks((1, columns), some((rows, 1), generator))
    if kind == "columns":
        return Blocks((rows, 1), some((1, columns), generator))
    return Entries(some((rows * columns,), generator)[:, 0]) if kind == "entries" else Whole()


def change_of(kind: str, shape: tuple[int, int], dtype: torch.dtype, size: float, seed: int) -> tuple[Tensor, Delta]:
    """A base of values of many sizes, and a delta of it."""
    generator = torch.Generator().manual_seed(seed)
    full = (3, *shape) if kind.startswith("stacked") else shape
    base = torch.randn(full, generator=generator) * 10.0 ** torch.randint(-3, 2, full, generator=generator)
    base = base.to(dtype)
    base.view(-1)[:2] = -0.0
    if kind == "low_rank":
        left, right = (torch.randn(s, generator=generator) for s in ((shape[0], 4), (4, shape[1])))
        piece: Piece | LowRankPiece = LowRankPiece.of(base, left * size, right, region=LowRank(4, 8.0))
    else:
        region = region_of_kind(kind, full, generator)
        moved = (base.double() + size * torch.randn(full, generator=generator)).to(dtype)
        trained = base.clone()
        region.scatter_(trained, region.gather(moved))
        piece = Piece.of(base, trained, region)
    return base, Delta({"w": piece}, method={"made": {}}, total=base.numel())


def dense(piece: Any) -> Tensor:
    out = torch.zeros(piece.shape, dtype=torch.float64)
    piece.region.scatter_(out, piece.change())
    return out


def exact_both_ways(small: Delta, base: Tensor, folder: Path) -> Delta:
    """Saved and loaded it makes base + decoded change, rounded once, inside its region only, and takes it back."""
    small.save(folder)
    loaded = Delta.load(folder)
    piece, made = loaded.pieces["w"], small.pieces["w"]
    assert made.to_files()[0] == piece.to_files()[0]
    for key, tensor in made.to_files()[1].items():
        assert bits(tensor) == bits(piece.to_files()[1][key])
    model = holder(w=base)
    loaded.apply(model)
    inside = piece.region.mask(base.shape)
    expected = torch.where(inside, (base.double() + dense(piece)).to(base.dtype), base)
    assert bits(model.w) == bits(expected)
    if bits(model.w) != bits(base):  # else the change is less than the type's steps, and there is nothing to remove
        loaded.remove(model)
    assert bits(model.w) == bits(base)
    assert dict(loaded.plan) == dict(small.plan)
    return loaded


def one(base: Tensor, trained: Tensor) -> Delta:
    return Delta({"w": Piece.of(base, trained, Whole())}, method={"made": {}}, total=base.numel())
