"""The largest changes of a whole delta."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..core.entries import Entries
from ..core.errors import ThriftyError
from ..core.low_rank import LowRank
from ..core.region import Region, Whole
from .algebra import Base, _base_tensor
from .delta import Delta
from .files import AnyPiece, nbytes
from .piece import Piece

__all__ = ["finite", "pruned"]


def finite(name: str, numbers: Tensor) -> Tensor:
    """`numbers`; ThriftyError where one is infinite or NaN."""
    if not bool(numbers.isfinite().all()):
        raise ThriftyError(f"{name} changes by numbers that are not finite: it cannot be compressed")
    return numbers


def pruned(
    delta: Delta, names: Sequence[str], *, share: float, base: Base | None
) -> tuple[dict[str, Region], Callable[[str], AnyPiece]]:
    """What is left of `names` with `share` of their numbers: the regions, and what makes the piece of a name. A region
    is entries, or as it was where that takes fewer bytes; then what is not kept has its original value."""

    def plain(name: str) -> Piece:
        old = delta.pieces[name]
        if isinstance(old, Piece):
            return old
        tensor = _base_tensor(name, old, base)
        trained = tensor.clone()
        old.write_(trained)
        return Piece.of(tensor, trained, Whole() if isinstance(old.region, LowRank) else old.region)

    def keys() -> Iterator[tuple[str, Piece, Tensor]]:
        for name in names:
            found = plain(name)
            size = finite(name, found.change()).abs().to(torch.float32).flatten()
            yield name, found, size.view(torch.int32)  # in the order of the sizes, as they are not negative

    cut, ties = _cut(lambda: (key for _, _, key in keys()), share)
    regions: dict[str, Region] = {}
    kept: dict[str, Entries] = {}
    for name, old, key in keys():
        keep = key > cut
        tied = (key == cut).nonzero()[:, 0][:ties]
        ties -= len(tied)
        keep[tied] = True
        if not bool(keep.any()):
            continue
        mask = torch.zeros(old.shape, dtype=torch.bool)
        old.region.scatter_(mask, keep.view(old.values.shape))
        kept[name] = Entries(mask.flatten().nonzero()[:, 0])
        _, index = kept[name].to_files()
        assert index is not None
        smaller = index.nbytes + 2 * len(index) * old.dtype.itemsize < nbytes(old)
        regions[name] = kept[name] if smaller else old.region

    def piece(name: str) -> AnyPiece:
        old, region = plain(name), regions[name]
        before = torch.zeros(old.shape, dtype=old.dtype)
        old.region.scatter_(before, old.original)
        trained, after = before.clone(), before.clone()
        old.write_(trained)
        kept[name].scatter_(after, kept[name].gather(trained))
        return Piece(region, old.shape, region.gather(after), region.gather(before), old.fingerprint)

    return regions, piece


def _cut(keys: Callable[[], Iterator[Tensor]], share: float) -> tuple[int, int]:
    """The key from which on numbers are kept, and how many of those equal to it. Keys are 31 bits; two counts, of the
    upper 16 and then of the lower 15, take no more memory than one tensor."""
    total, upper = 0, torch.zeros(2**16, dtype=torch.int64)
    for key in keys():
        total += key.numel()
        upper += torch.bincount(key[key > 0] >> 15, minlength=2**16)
    wanted = min(max(1, int(share * total + 1e-9)), int(upper.sum()))
    if not wanted:
        raise ThriftyError("nothing changes in this delta: there is nothing to keep")
    high, wanted = _bin(upper, wanted)
    lower = torch.zeros(2**15, dtype=torch.int64)
    for key in keys():
        here = key[(key > 0) & (key >> 15 == high)]
        lower += torch.bincount(here & (2**15 - 1), minlength=2**15)
    low, wanted = _bin(lower, wanted)
    return high << 15 | low, wanted


def _bin(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin in which the `wanted` highest end, and how many of them are in it."""
    reach = counts.flip(0).cumsum(0)
    place = int((reach < wanted).sum())
    bin_ = len(counts) - 1 - place
    return bin_, wanted - int(reach[place]) + int(counts[bin_])
