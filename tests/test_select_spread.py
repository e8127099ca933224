"""Blocks that are spread over their matrix: against a plain twin, and in a plan."""

from __future__ import annotations

import math

import pytest
import torch
from families import build
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import thrifty
from thrifty.core.errors import ThriftyError
from thrifty.select.spread import spread, spread_scores


def plain(scores: Tensor, blocks: int) -> set[tuple[int, int]]:
    """As the words say it: cell by cell, the best first, round after round."""
    if scores.shape[0] < scores.shape[1]:
        return {(i, j) for j, i in plain(scores.t(), blocks)}
    rows, columns = scores.shape
    taken: list[tuple[int, int]] = []
    while len(taken) < min(blocks, scores.numel()):
        this_round: list[tuple[int, int]] = []
        for i, j in sorted(
            ((i, j) for i in range(rows) for j in range(columns)), key=lambda cell: -float(scores[cell])
        ):
            in_row, in_column = (sum(cell[k] == (i, j)[k] for cell in this_round) for k in (0, 1))
            if (i, j) not in taken and in_row < 1 and in_column < math.ceil(rows / columns):
                this_round.append((i, j))
        taken += this_round[: blocks - len(taken)]
    return set(taken)


grids = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**16)).map(
    lambda n: torch.randperm(n[0] * n[1], generator=torch.Generator().manual_seed(n[2])).reshape(n[0], n[1]).float()
)


@given(grids, st.integers(1, 40))
def test_as_the_plain_words_say(scores: Tensor, blocks: int) -> None:
    found = [tuple(cell) for cell in spread(scores, blocks=blocks).tolist()]
    assert len(found) == len(set(found)) == min(blocks, scores.numel())
    assert set(found) == plain(scores, blocks)


@given(grids, st.floats(0.01, 1))
def test_its_scores_put_the_same_cells_first(scores: Tensor, share: float) -> None:
    blocks = max(1, round(share * scores.numel()))
    best = spread_scores(scores, share=share).flatten().argsort(descending=True)[:blocks]
    first = spread(scores, blocks=blocks)
    assert set(best.tolist()) == set((first[:, 0] * scores.shape[1] + first[:, 1]).tolist())


def test_one_block_in_each_strip_of_a_square_matrix() -> None:
    """Where gradients favour one input, all blocks of smt lie there; spread, each input has one."""
    model = build("llama")
    name = "model.layers.0.self_attn.o_proj.weight"
    side = dict(model.named_parameters())[name].shape[0]
    crowded = torch.ones(side // 4, side // 4)
    crowded[:, 0] = 100.0
    chosen = spread(crowded, blocks=side // 4)
    assert chosen[:, 1].sort().values.tolist() == list(range(side // 4))
    options = {"scope": "per_matrix", "block_size": 4, "target_modules": ["o_proj"]}
    tuning = thrifty.attach(model, {"random_blocks": {**options, "spread": True}}, budget=3 * 16 * (side // 4))
    index = tuning.plan[name].index
    assert sorted(index[:, 0].tolist()) == sorted(index[:, 1].tolist()) == list(range(side // 4))


def test_it_needs_the_scope_of_a_matrix() -> None:
    with pytest.raises(ThriftyError, match="spread places blocks in each matrix: it needs scope per_matrix"):
        thrifty.attach(build("llama"), {"random_blocks": {"spread": True, "scope": "global"}}, budget=0.1)
