"""Random models, regions of every kind, and deltas that move them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from thrifty.core.entries import Entries
from thrifty.core.low_rank import LowRank
from thrifty.core.region import Blocks, Region, Whole
from thrifty.delta import Delta, LowRankPiece, Piece

__all__ = ["KINDS", "bits", "deltas", "model", "moved", "tensors"]

KINDS = ("whole", "blocks", "rows", "columns", "entries", "low_rank")


class Odd(nn.Module):
    """A matrix, stacked experts, a vector, and a matrix that no delta here touches."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(9, 7))
        self.experts = nn.Parameter(torch.empty(2, 5, 6))
        self.vector = nn.Parameter(torch.empty(11))
        self.other = nn.Parameter(torch.empty(3, 4))


def model(dtype: torch.dtype = torch.float32, seed: int = 0) -> Odd:
    """Values that arithmetic would not give back, with -0.0 among them."""
    made, generator = Odd(), torch.Generator().manual_seed(seed)
    for p in made.parameters():
        powers = 10.0 ** torch.randint(-3, 3, p.shape, generator=generator)
        p.data = torch.randn(p.shape, generator=generator).mul(powers).to(dtype)
        p.data.view(-1)[:1] = -0.0
    return made


def tensors(made: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in made.named_parameters()}


def bits(made: nn.Module) -> dict[str, bytes]:
    return {name: p.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, p in made.named_parameters()}


def _region(draw: st.DrawFn, kind: str, shape: tuple[int, ...]) -> Region:
    numbers = torch.Size(shape).numel()
    if kind == "low_rank" and len(shape) == 2:
        rank = draw(st.integers(1, 3))
        return LowRank(rank, float(2 * rank))
    if kind in ("whole", "low_rank"):
        return Whole()
    if kind == "entries" or len(shape) == 1:
        return Entries(torch.tensor(draw(st.lists(st.integers(0, numbers - 1), min_size=1, max_size=20, unique=True))))
    rows, columns = shape[-2:]
    h, w = {"rows": (1, columns), "columns": (rows, 1)}.get(kind) or (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    axes = [*shape[:-2], -(-rows // h), -(-columns // w)]
    every = st.tuples(*(st.integers(0, n - 1) for n in axes))
    return Blocks((h, w), torch.tensor(draw(st.lists(every, min_size=1, max_size=6, unique=True))))


@st.composite
def deltas(draw: st.DrawFn, dtype: torch.dtype, *, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> Delta:
    """A delta of `model(dtype, seed)` that touches one to three of its tensors."""
    base = tensors(model(dtype, seed))
    names = draw(st.lists(st.sampled_from(["matrix", "experts", "vector"]), min_size=1, unique=True))
    regions = {name: _region(draw, draw(st.sampled_from(kinds)), tuple(base[name].shape)) for name in names}
    return moved(base, regions, seed=draw(st.integers(0, 2**16)))


def moved(base: dict[str, Tensor], regions: dict[str, Region], *, seed: int) -> Delta:
    """A delta of `base` that changes every number in `regions`, some of them not at all."""
    generator = torch.Generator().manual_seed(seed)
    pieces: dict[str, Piece | LowRankPiece] = {}
    for name in (n for n in base if n in regions):
        region, before = regions[name], base[name]
        if isinstance(region, LowRank):
            left = torch.randn(before.shape[0], region.r, generator=generator)
            right = torch.randn(region.r, before.shape[1], generator=generator)
            pieces[name] = LowRankPiece.of(before, left, right, region=region)
            continue
        after, values = before.clone(), region.gather(before)
        step = torch.randn(values.shape, generator=generator)
        step[torch.rand(values.shape, generator=generator) < 0.2] = 0
        region.scatter_(after, (values.float() + step).to(before.dtype))
        pieces[name] = Piece.of(before, after, region)
    total = sum(t.numel() for t in base.values())
    return Delta(pieces, method={"test": {}}, total=total)
