"""The way back from a changed tensor, bit for bit.

Subtracting the change from what it made gives the base, but for numbers whose last bits rounding took: those whose
exponent grew. The difference of the bit patterns, zero nearly everywhere, is kept compressed.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ThriftyError
from .digest import bits

__all__ = ["floating_dtype", "pack_back", "unpack_back"]


def pack_back(base: Tensor, guess: Tensor, *, level: int = 6) -> Tensor:
    """What makes `base` of `guess`, of one shape and dtype: uint8, compressed. level: zlib's, 9 is slowest."""
    # wraps around, so that adding it again is exact whatever the values are
    lost = bits(base.cpu()) - bits(guess.cpu())
    return torch.frombuffer(bytearray(zlib.compress(lost.numpy().tobytes(), level)), dtype=torch.uint8)


def unpack_back(back: Tensor, guess: Tensor) -> Tensor:
    """The base that `pack_back` was given, on the CPU; ThriftyError where `back` is damaged."""
    found = bits(guess.cpu())
    size = found.numel() * found.dtype.itemsize
    try:
        data = zlib.decompressobj().decompress(back.numpy().tobytes(), size)
    except zlib.error as error:
        raise ThriftyError(f"this delta is damaged ({error}): make or copy it again") from None
    if len(data) != size:
        raise ThriftyError("this delta is damaged: what takes a tensor back to its base is cut off; copy it again")
    lost = torch.from_numpy(np.frombuffer(bytearray(data), dtype=found.numpy().dtype)).view(found.shape)
    return (found + lost).view(guess.dtype)


def floating_dtype(name: str, record: Mapping[str, Any]) -> torch.dtype:
    """The tensor's dtype in a file's record; ThriftyError where it is no floating-point type."""
    dtype = getattr(torch, str(record["dtype"]), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ThriftyError(f"{name}: the delta's dtype {record['dtype']!r} is no floating-point type: it is damaged")
    return dtype
