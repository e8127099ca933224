"""Deltas made by hand, so that a test chooses what they change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thrifty.core.errors import ThriftyError
from thrifty.core.low_rank import LowRank
from thrifty.core.region import Region
from thrifty.delta import Delta, LowRankPiece, Piece

__all__ = ["bits", "parameters", "refused", "tuned"]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: p.contiguous().view(torch.uint8).numpy().tobytes() for name, p in parameters(model).items()}


def tuned(model: nn.Module, regions: Mapping[str, Region], *, seed: int = 0, size: float = 0.1) -> Delta:
    """A delta that moves what lies in `regions` at random."""
    generator, found = torch.Generator().manual_seed(seed), parameters(model)
    pieces: dict[str, Any] = {}
    for name, region in regions.items():
        base = found[name]
        wide = torch.promote_types(base.dtype, torch.float32)
        if isinstance(region, LowRank):
            shapes = (len(base), region.r), (region.r, base.shape[1])
            left, right = (torch.randn(shape, generator=generator).to(wide) for shape in shapes)
            pieces[name] = LowRankPiece.of(base, left * size, right, region=region)
            continue
        moved = (base.to(wide) + size * torch.randn(base.shape, generator=generator).to(wide)).to(base.dtype)
        trained = base.clone()
        region.scatter_(trained, region.gather(moved))
        pieces[name] = Piece.of(base, trained, region)
    return Delta(pieces, method={"test": {}}, total=sum(p.numel() for p in model.parameters()))


def refused(call: Any, message: str) -> None:
    """It raises one line."""
    with pytest.raises(ThriftyError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
