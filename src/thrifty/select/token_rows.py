"""The rows of new tokens, trained beside whatever a method trains."""

from __future__ import annotations

import torch
from torch import nn

from ..core.entries import Entries, union
from ..core.errors import ThriftyError
from ..core.low_rank import LowRank
from ..core.plan import Plan
from ..core.region import Blocks, Region
from ..core.rotated import Rotated
from ..delta.vocabulary import NewTokens, vocabulary_tensors

__all__ = ["with_token_rows"]


def with_token_rows(model: nn.Module, plan: Plan, new_tokens: NewTokens | None) -> Plan:
    """`plan` with the rows of `new_tokens` in the embedding, an untied head and a head's bias; what a method trains
    there already is kept and counted once. They come on top of a method's budget. ThriftyError where the method trains
    such a tensor in a rotated basis, in which single rows do not exist."""
    if new_tokens is None:
        return plan
    regions = dict(plan)
    for name, tensor in vocabulary_tensors(model).items():
        rows, region = torch.tensor(new_tokens.trained), regions.get(name)
        if isinstance(region, Rotated):
            raise ThriftyError(
                f"{name} is trained in a rotated basis, beside which no rows of new tokens can be trained: "
                "leave it out of target_modules, or train without new tokens"
            )
        new: Region = Entries(rows)
        if tensor.ndim > 1:
            new = Blocks((1, tensor.shape[1]), torch.stack([rows, torch.zeros_like(rows)], dim=1))
        if not isinstance(region, LowRank):  # which no such tensor takes: putting it in place says so
            regions[name] = new if region is None else union(region, new, tensor.shape)
    return Plan.of(model, regions, kept_columns=plan.kept_columns)
