"""Region gradients on a GPU: every block of a group in one launch, with float32 accumulation.

A program computes one tile of one block over one share of the tokens. Where few tiles would leave most of the GPU
idle, the tokens are split: each share writes its own float32 partial, and a sum adds them in a fixed order. Atomics
would save that buffer (small: splits only where tiles are few) but add in an order that changes from run to run.
float32 products are exact float32 (no TF32), as in PyTorch's default. Imported only where a CUDA tensor asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .region_ways import OneProduct, StripGroup, Way

__all__ = ["TritonBlocks", "blocks_into", "on_gpu"]

_PROGRAMS = 528  # four for each of an H100's 132 multiprocessors; a constant, so that results do not depend on the GPU
_LEAST_TOKENS = 256  # of one share
_TOKENS = 32  # of one step
_TILE = 64  # longest side of a tile; 16 is the shortest that tl.dot takes


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]  # triton reads annotations itself
    dy,
    x,
    rows,
    slots,
    out,
    tokens,
    share,
    h,
    w,
    dy_t,
    dy_o,
    x_t,
    x_u,
    numbers,
    TILES_H: tl.constexpr,
    TILES_W: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    block = tile // (TILES_H * TILES_W)
    within = tile % (TILES_H * TILES_W)
    i = within // TILES_W * BH + tl.arange(0, BH)
    j = within % TILES_W * BW + tl.arange(0, BW)
    o = (tl.load(rows + block) + i).to(tl.int64) * dy_o
    u = (tl.load(slots + block) + j).to(tl.int64) * x_u
    end = tl.minimum((split + 1) * share, tokens)
    total = tl.zeros((BH, BW), dtype=tl.float32)
    for first in range(split * share, end, BT):
        t = first + tl.arange(0, BT)
        a = tl.load(
            dy + o[:, None] + t[None, :].to(tl.int64) * dy_t, mask=(i < h)[:, None] & (t < end)[None, :], other=0.0
        )
        b = tl.load(
            x + t[:, None].to(tl.int64) * x_t + u[None, :], mask=(t < end)[:, None] & (j < w)[None, :], other=0.0
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    place = split.to(tl.int64) * numbers + block.to(tl.int64) * h * w + i[:, None] * w + j[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(i < h)[:, None] & (j < w)[None, :])


def _side(length: int) -> int:
    return min(_TILE, max(16, triton.next_power_of_2(length)))


def blocks_into(dy_TO: Tensor, x_TU: Tensor, rows: Tensor, slots: Tensor, out: Tensor) -> None:
    """Write `dy[:, rows[k] : + h]^T x[:, slots[k] : + w]` into `out` `[n, h, w]`, contiguous, in its dtype.

    `dy` and `x`: float32, float16 or bfloat16, the same one, of any strides; `rows` and `slots`: int32 `[n]` on the
    same device.
    """
    n, h, w = out.shape
    assert out.is_contiguous()
    assert dy_TO.dtype == x_TU.dtype != torch.float64, (dy_TO.dtype, x_TU.dtype)
    if out.numel() == 0:
        return
    tokens, tile_h, tile_w = dy_TO.shape[0], _side(h), _side(w)
    tiles_h, tiles_w = triton.cdiv(h, tile_h), triton.cdiv(w, tile_w)
    tiles = n * tiles_h * tiles_w
    splits = max(1, min(triton.cdiv(_PROGRAMS, tiles), tokens // _LEAST_TOKENS))
    share = triton.cdiv(triton.cdiv(tokens, splits), _TOKENS) * _TOKENS
    written = out if splits == 1 else out.new_empty((splits, n, h, w), dtype=torch.float32)
    _kernel[(tiles, splits)](
        dy_TO,
        x_TU,
        rows,
        slots,
        written,
        tokens,
        share,
        h,
        w,
        dy_TO.stride(0),
        dy_TO.stride(1),
        x_TU.stride(0),
        x_TU.stride(1),
        out.numel(),
        TILES_H=tiles_h,
        TILES_W=tiles_w,
        BT=_TOKENS,
        BH=tile_h,
        BW=tile_w,
    )
    if splits > 1:
        out.copy_(written.sum(0))


@dataclass(frozen=True)
class TritonBlocks:
    """The kernel as a way; `plain` takes float64, which tensor cores do not."""

    plain: Way
    rows: Tensor
    slots: Tensor

    def into(self, dy_TO: Tensor, x_TU: Tensor, out: Tensor) -> None:
        if dy_TO.dtype == torch.float64:
            self.plain.into(dy_TO, x_TU, out)
        else:
            blocks_into(dy_TO, x_TU, self.rows, self.slots, out)

    def to(self, device: torch.device) -> TritonBlocks:
        return replace(self, plain=self.plain.to(device), rows=self.rows.to(device), slots=self.slots.to(device))


def on_gpu(group: StripGroup, plain: Way) -> Way:
    """The kernel, unless all used rows and columns are blocks (whole columns, whole rows): one product is faster."""
    if isinstance(plain, OneProduct) and plain.pick is None:
        return plain
    rows, slots = (torch.tensor(starts, dtype=torch.int32) for starts in (group.rows, group.slots))
    return TritonBlocks(plain, rows, slots)
