"""The way back from a changed tensor, bit for bit.

Subtracting the change from what it made gives the base, but for numbers whose last bits rounding took: those whose
exponent grew. The difference of the bit patterns, zero nearly everywhere, is kept compressed.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ThriftyError

__all__ = ["pack_back", "unpack_back"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(_BITS[tensor.dtype.itemsize])


def pack_back(base: Tensor, guess: Tensor, *, level: int = 6) -> Tensor:
    """What makes `base` of `guess`, of one shape and dtype: uint8, compressed. level: zlib's, 9 is slowest."""
    lost = _bits(base) - _bits(guess)  # wraps around, so that adding it again is exact whatever the values are
    return torch.frombuffer(bytearray(zlib.compress(lost.numpy().tobytes(), level)), dtype=torch.uint8)


def unpack_back(back: Tensor, guess: Tensor) -> Tensor:
    """The base that `pack_back` was given, on the CPU; ThriftyError where `back` is damaged."""
    bits = _bits(guess)
    size = bits.numel() * bits.dtype.itemsize
    try:
        data = zlib.decompressobj().decompress(back.numpy().tobytes(), size)
    except zlib.error as error:
        raise ThriftyError(f"this delta is damaged ({error}): make or copy it again") from None
    if len(data) != size:
        raise ThriftyError("this delta is damaged: what takes a tensor back to its base is cut off; copy it again")
    lost = torch.from_numpy(np.frombuffer(bytearray(data), dtype=bits.numpy().dtype)).view(bits.shape)
    return (bits + lost).view(guess.dtype)
