"""What a delta holds, for people: sizes, norms, effective ranks, and a picture of where it lies."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ThriftyError
from ..core.plan import kind_of, layer_of
from .algebra import dense_change
from .delta import Delta
from .files import AnyPiece

__all__ = ["Row", "draw", "rows", "table"]

_SIDE = 48  # pixels of a matrix in the picture, at most


@dataclass(frozen=True)
class Row:
    """One tensor of a delta. `change`, `largest`: norm and largest absolute value of what was added; `relative`: that
    norm over the norm of the values before, None for a low-rank pair, which does not hold them; `rank`: effective rank
    of the change, None unless asked for and for what is no matrix."""

    name: str
    region: str
    shape: tuple[int, ...]
    numbers: int
    change: float
    largest: float
    relative: float | None
    rank: float | None


def rows(delta: Delta, *, ranks: bool = False) -> list[Row]:
    """One for each tensor, in the model's order. `ranks`: singular values too, seconds for each large matrix."""
    return [_row(name, piece, ranks=ranks) for name, piece in delta.pieces.items()]


def _row(name: str, piece: AnyPiece, *, ranks: bool) -> Row:
    dense = dense_change(piece)
    original = getattr(piece, "original", None)
    before = None if original is None else float(original.double().norm())
    change = float(dense.norm())
    return Row(
        name,
        piece.region.kind,
        piece.shape,
        piece.region.size(piece.shape),
        change,
        float(dense.abs().max()),
        None if not before else change / before,
        effective_rank(dense) if ranks and dense.ndim == 2 else None,
    )


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the singular values divided by their sum (Roy and Vetterli 2007): the number of equally
    large directions that would be as spread out; 0 for a matrix of zeros."""
    values = torch.linalg.svdvals(matrix.float()).double()
    share = values[values > 0] / values.sum()
    return float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0


def table(found: Iterable[Row], *, each: bool = False) -> str:
    """Tab-free text: one line a layer and kind, or one a tensor with `each`."""
    found = list(found)
    if each:
        head = ["tensor", "region", "shape", "numbers", "change", "relative", "largest", "rank"]
        body = [
            [
                r.name,
                r.region,
                "x".join(map(str, r.shape)),
                f"{r.numbers:,}",
                *_norms([r]),
                f"{r.largest:.3g}",
                _rank(r),
            ]
            for r in found
        ]
        return _columns([head, *body])
    groups: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for r in found:
        layer = layer_of(r.name)
        groups[math.inf if layer is None else layer, kind_of(r.name)].append(r)  # type: ignore[index]
    body = [
        [
            "outside" if layer == math.inf else str(layer),
            kind,
            str(len(members)),
            f"{sum(r.numbers for r in members):,}",
            *_norms(members),
        ]
        for (layer, kind), members in sorted(groups.items())
    ]
    return _columns([["layer", "kind", "tensors", "numbers", "change", "relative"], *body])


def _norms(members: list[Row]) -> list[str]:
    change = math.sqrt(sum(r.change**2 for r in members))
    before = [r.change / r.relative for r in members if r.relative]
    relative = f"{change / math.sqrt(sum(b**2 for b in before)):.2%}" if len(before) == len(members) else ""
    return [f"{change:.4g}", relative]


def _rank(row: Row) -> str:
    return "" if row.rank is None else f"{row.rank:.1f}"


def _columns(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def draw(delta: Delta, path: Path) -> None:
    """Write a picture (PNG, by the name's ending any other format of matplotlib) of where the delta lies: a row a
    layer, a column a kind of matrix, every matrix by the share of its numbers that changed, darker for more."""
    try:
        import matplotlib
    except ImportError:
        raise ThriftyError("drawing needs matplotlib: pip install 'thrifty[plots]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    plan = delta.plan
    names = [name for name in plan if len(plan.shapes[name]) > 1]
    if not names:
        raise ThriftyError("this delta changes no matrix: there is nothing to draw")
    layers = sorted({layer for name in names if (layer := layer_of(name)) is not None})
    kinds = list(dict.fromkeys(_column(name) for name in names))
    size = (1 + 1.1 * len(kinds), 1 + 0.9 * max(1, len(layers)))
    figure, axes = pyplot.subplots(max(1, len(layers)), len(kinds), figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_facecolor("0.93")
    for name in names:
        layer = layer_of(name)
        row = 0 if layer is None else layers.index(layer)
        axis = axes[row, kinds.index(_column(name))]
        shape = plan.shapes[name]
        share = _shares(plan[name].mask(shape).reshape(-1, shape[-1]))
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for axis, kind in zip(axes[0], kinds):
        axis.set_title(kind, fontsize=7)
    for axis, layer in zip(axes[:, 0], layers):
        axis.set_ylabel(str(layer), fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _column(name: str) -> str:
    """`q_proj` of `model.layers.3.self_attn.q_proj.weight`."""
    parts = name.removesuffix(".weight").split(".")
    return parts[-1]


def _shares(mask: Tensor) -> np.ndarray:
    """The share of true numbers in each cell of a grid of at most _SIDE x _SIDE."""
    rows, columns = mask.shape
    grid = torch.nn.functional.adaptive_avg_pool2d(mask.float()[None], (min(_SIDE, rows), min(_SIDE, columns)))
    return grid[0].numpy()
