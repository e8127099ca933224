"""Choosing the best under a ceiling: pieces with a score and a size, each of one owner, within a scope."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import ThriftyError, unknown
from ..core.plan import kind_of
from .layers import layer_of

__all__ = ["ORDERS", "SCOPES", "check_order", "group_of", "pick", "shares"]

SCOPES = ("global", "per_kind", "per_layer", "per_matrix")
ORDERS = ("highest", "lowest")


def check_order(order: object) -> None:
    """ThriftyError where `order` is none of ORDERS."""
    if order not in ORDERS:
        raise ThriftyError(unknown("order", str(order), ORDERS))


def group_of(name: str, scope: str) -> str:
    """Which parameters share a part of the budget with `name` under `scope`: what they have in common. Those outside
    the layers are one group of `per_layer`."""
    if scope == "per_layer":
        return str(layer_of(name))
    return {"global": "", "per_kind": kind_of(name)}.get(scope, name)


def pick(
    scores: Tensor,
    sizes: Tensor,
    *,
    owner: Tensor,
    groups: Sequence[str],
    whole: Sequence[int],
    scope: str,
    ceiling: int,
) -> Tensor:
    """Positions of the pieces chosen, their sizes together at most `ceiling` (ties: the earlier piece).

    scores, sizes, owner: `[n]`. groups, whole: of each owner, its group (see `group_of`) and its full size, by which a
    scope divides the ceiling, also where only some of its pieces are offered.
    """
    if scope == "global":
        return _best(scores, sizes, ceiling)
    names = list(dict.fromkeys(groups))
    owner = torch.tensor([names.index(group) for group in groups])[owner]
    whole = [sum(size for size, g in zip(whole, groups, strict=True) if g == name) for name in names]
    room = torch.zeros(len(whole), dtype=torch.int64).index_add_(0, owner, sizes).tolist()
    kept, extra = [], []
    for i, share in enumerate(shares(whole, room, ceiling)):
        here = (owner == i).nonzero()[:, 0]
        best = here[_best(scores[here], sizes[here], share)]
        kept.append(best)
        extra.append((len(best) > 0, int(sizes[best].sum()) - share, i))
    if scope == "per_kind":
        return torch.cat(kept)
    left = ceiling - sum(int(sizes[k].sum()) for k in kept)
    taken = torch.cat(kept)
    for _, _, i in sorted(extra):  # groups without a piece first, then those furthest below their share
        fitting = ((owner == i) & (sizes <= left)).nonzero()[:, 0]
        fitting = fitting[~torch.isin(fitting, taken)]
        if len(fitting):
            position = fitting[torch.argmax(scores[fitting])]
            left -= int(sizes[position])
            kept.append(position[None])
    return torch.cat(kept)


def shares(whole: Sequence[int], room: Sequence[int], ceiling: int) -> list[int]:
    """`ceiling` in proportion to `whole`, no share above its `room`: what one cannot use goes to the others."""
    given, left, open_ = list(room), ceiling, list(range(len(whole)))
    while open_:
        total = sum(whole[i] for i in open_)
        full = [i for i in open_ if left * whole[i] // total >= room[i]]
        if not full:
            for i in open_:
                given[i] = left * whole[i] // total
            break
        left -= sum(room[i] for i in full)
        open_ = [i for i in open_ if i not in full]
    return given


def _best(scores: Tensor, sizes: Tensor, ceiling: int) -> Tensor:
    """Positions of the best pieces, best first, as many as fit under `ceiling` (ties: the earlier one)."""
    order = torch.argsort(scores, descending=True, stable=True)
    spent = sizes[order].cumsum(0)
    n = int((spent <= ceiling).sum())
    left = ceiling - (int(spent[n - 1]) if n else 0)
    kept, smallest = [order[:n]], int(sizes.min()) if len(sizes) else 0
    for position in order[n:]:  # what is left buys no piece of full size: at most the smaller ones of an edge
        if left < smallest:
            break
        if int(sizes[position]) <= left:
            left -= int(sizes[position])
            kept.append(position[None])
    return torch.cat(kept)
