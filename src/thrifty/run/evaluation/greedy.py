"""Greedy generation of one batch by transformers' `generate`, which rows leave as they end.

Names: B rows, T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from thrifty.objective.heads import unwrapped

__all__ = ["continued", "greedy_only"]

_LEAVE_TOGETHER = 8  # rows leave once an eighth of the batch has ended: each time, the cache of the others is copied


@contextmanager
def greedy_only(model: nn.Module, *, stops: list[int], pad: int, limit: int) -> Iterator[GenerationConfig]:
    """The one configuration that decides: a model's own may sample, penalize repetition, or forbid tokens.

    `generate` fills what a given configuration leaves open from the model's own, so that one is set aside meanwhile.
    """
    config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=limit,
        eos_token_id=stops or None,
        pad_token_id=pad,
        return_dict_in_generate=True,
    )
    holders: list[Any] = list(dict.fromkeys((model, unwrapped(model))))
    before = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = config
        yield config
    finally:
        for holder, own in zip(holders, before):
            holder.generation_config = own


def continued(model: Any, prompts: Sequence[list[int]], config: GenerationConfig) -> list[list[int]]:
    """The ids that follow each prompt; what stands behind the first of `config`'s end tokens has no meaning.

    A row that has ended would cost as much as one that goes on: rows leave the batch, an eighth of it at a time.
    """
    width = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), width), config.pad_token_id, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):  # on the left, so that all answers begin in the same column
        ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, width - len(prompt) :] = 1
    device = next(model.parameters()).device
    ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
    ended = _Ended(width=width, stops=torch.tensor(config.eos_token_id or (), dtype=torch.long, device=device))
    found: list[list[int]] = [[]] * len(prompts)
    numbers = list(range(len(prompts)))  # of the rows that are in the batch
    cache: DynamicCache | None = None
    leaving = unwrapped(model) is model  # a wrapper may put more into the cache than the rows' tokens
    while numbers:
        ended.enough = max(1, len(numbers) // _LEAVE_TOGETHER) if leaving else len(numbers)
        rest = copy.copy(config)
        rest.max_new_tokens = width + config.max_new_tokens - ids_BT.shape[1]
        out = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            generation_config=rest,
            stopping_criteria=StoppingCriteriaList([ended]),
            **({} if cache is None else {"past_key_values": cache}),
        )
        ids_BT = out.sequences
        over_B = ended.rows(ids_BT) | (ids_BT.shape[1] == width + config.max_new_tokens)
        for number, ids, over in zip(numbers, ids_BT.tolist(), over_B.tolist()):
            if over:
                found[number] = ids[width:]
        kept_R = (~over_B).nonzero().squeeze(1)
        numbers = [numbers[row] for row in kept_R.tolist()]
        ids_BT = ids_BT[kept_R]
        mask_BT = F.pad(mask_BT[kept_R], (0, ids_BT.shape[1] - mask_BT.shape[1]), value=1)
        cache = _selected(getattr(out, "past_key_values", None), kept_R)
        leaving = cache is not None
    return found


class _Ended(StoppingCriteria):
    """Stops all rows as soon as `enough` of them have ended."""

    def __init__(self, *, width: int, stops: Tensor) -> None:
        self.width, self.stops, self.enough = width, stops, 1

    def rows(self, ids_BT: Tensor) -> Tensor:
        """Whether each row has an end token behind its prompt: bool [B]."""
        return torch.isin(ids_BT[:, self.width :], self.stops).any(dim=1)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        ended_B = self.rows(input_ids)
        return torch.full_like(ended_B, bool(ended_B.sum() >= self.enough))


def _selected(cache: Any, kept_R: Tensor) -> DynamicCache | None:
    """`cache` with some of its rows; None where it holds more than keys and values (a recurrent state)."""
    if type(cache) is not DynamicCache:
        return None
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    cache.batch_select_indices(kept_R)
    return cache
