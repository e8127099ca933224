"""The pieces of a delta on a model's device: what a swap writes, and the exact way back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.entries import Entries
from ..core.low_rank import LowRank
from ..core.region import Blocks, Region, Whole
from ..kernels.low_rank import add_product, subtract_product
from .additive import Addend, of_pair, of_region
from .coded import CodedPiece
from .digest import bits, fingerprint
from .files import AnyPiece
from .low_rank import LowRankPiece
from .piece import Piece

__all__ = ["Held", "HeldPair", "HeldRegion", "hold"]


class HeldRegion:
    """Values and originals of a region, in rows of `width` numbers that lie side by side in the tensor."""

    def __init__(self, piece: Piece, device: torch.device) -> None:
        self.region, self.shape = piece.region, piece.shape
        self.width, index = _rows(piece.region, piece.shape)
        self._index = None if index is None else index.to(device)
        # copies: nobody else may change what a swap writes
        self.values = piece.values.reshape(-1, self.width).to(device, copy=True)
        self.original = piece.original.reshape(-1, self.width).to(device, copy=True)
        self._addends: dict[bool, Addend] = {}

    @property
    def whole(self) -> bool:
        """Is every number of the tensor held?"""
        return self._index is None

    def _put(self, tensor: Tensor, packed: Tensor) -> None:
        flat = tensor.detach()
        if self._index is None:
            flat.copy_(packed.view(flat.shape))
        else:
            flat.view(-1, self.width).index_copy_(0, self._index, packed)

    def write_(self, tensor: Tensor) -> None:
        """Make the trained tensor of the base."""
        self._put(tensor, self.values)

    def take_back_(self, tensor: Tensor) -> None:
        """Make the base of the trained tensor."""
        self._put(tensor, self.original)

    def restore_(self, tensor: Tensor, *, trained: bool) -> None:
        """Make `tensor` trained or the base after a write that may have been cut off."""
        self._put(tensor, self.values if trained else self.original)

    def trained(self, base: Tensor) -> Tensor:
        """The whole trained tensor."""
        if self.whole:
            return self.values.view(self.shape)
        out = base.detach().clone()
        self.write_(out)
        return out

    def _change(self) -> Tensor:
        wide = torch.promote_types(self.values.dtype, torch.float32)
        return (self.values.to(wide) - self.original.to(wide)).to(self.values.dtype)

    def dense_change(self) -> Tensor:
        """The difference as a tensor of the base's shape, zero outside the region."""
        out = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        self._put(out, self._change())
        return out

    def addend(self, *, transposed: bool) -> Addend:
        """The additive form; only for parts of a matrix. Made once."""
        assert isinstance(self.region, Blocks | Entries)
        if transposed not in self._addends:
            change = self._change().flatten()
            self._addends[transposed] = of_region(self.region, change, self.shape, transposed=transposed)
        return self._addends[transposed]


class HeldPair:
    """Factors of a low-rank pair, and the base's values where rounding took from the way back."""

    whole = False

    def __init__(self, piece: LowRankPiece, base: Tensor) -> None:
        self.shape, self.scale = piece.shape, piece.region.scale
        self.left, self.right = (factor.to(base.device, copy=True) for factor in (piece.left, piece.right))
        self.fingerprint = piece.fingerprint
        guess = subtract_product(self.trained(base), self.left, self.right, scale=self.scale)
        differs = bits(guess) != bits(base)
        self._index = differs.flatten().nonzero()[:, 0]
        self._lost = base.detach().flatten().index_select(0, self._index)

    def trained(self, base: Tensor) -> Tensor:
        """The whole trained tensor: the same bits as when the delta is applied."""
        return add_product(base, self.left, self.right, scale=self.scale)

    def write_(self, tensor: Tensor) -> None:
        """Make the trained tensor of the base."""
        tensor.detach().copy_(self.trained(tensor))

    def take_back_(self, tensor: Tensor) -> None:
        """Make the base of the trained tensor."""
        guess = subtract_product(tensor, self.left, self.right, scale=self.scale)
        guess.view(-1).index_copy_(0, self._index, self._lost)
        tensor.detach().copy_(guess)

    def restore_(self, tensor: Tensor, *, trained: bool) -> None:
        """Make `tensor` trained or the base, whichever of the two it is."""
        is_base = fingerprint(tensor) == self.fingerprint
        if trained and is_base:
            self.write_(tensor)
        elif not trained and not is_base:
            self.take_back_(tensor)

    def addend(self, *, transposed: bool) -> Addend:
        """The additive form."""
        return of_pair(self.left, self.right, scale=self.scale, transposed=transposed)


Held = HeldRegion | HeldPair


def hold(piece: AnyPiece, base: Tensor) -> Held:
    """`piece` where `base` is, which must be its exact base."""
    if isinstance(piece, LowRankPiece):
        return HeldPair(piece, base)
    return HeldRegion(piece if isinstance(piece, Piece) else _decoded(piece, base), base.device)


def _decoded(piece: CodedPiece, base: Tensor) -> Piece:
    """A compressed piece with its values and originals."""
    trained = base.detach().clone()
    piece.write_(trained)
    return Piece.of(base, trained, Whole() if isinstance(piece.region, LowRank) else piece.region)


def _rows(region: Region, shape: tuple[int, ...]) -> tuple[int, Tensor | None]:
    """How many numbers of the region always lie side by side, and where each such row lies in the tensor cut into rows
    of that width, in packed order; None: the region is the whole tensor."""
    if isinstance(region, Entries):
        return 1, region.index
    if isinstance(region, Blocks):
        columns = shape[-1]
        width = math.gcd(columns, min(columns, region.shape[1]))
        places = []
        for group in region.groups(shape):
            row, column = group.element_index()
            places.append((row * (columns // width) + column[:, :, ::width] // width).flatten())
        return width, torch.cat(places)
    return math.prod(shape[-1:]), None
