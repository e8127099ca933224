"""Muon over leaves of every form, against PyTorch's, which takes matrices only."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import configuration, prepare
from torch import Tensor, nn

from thrifty import attach
from thrifty.core.errors import ThriftyError
from thrifty.optim import Muon
from thrifty.run.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("muon"))


def moved(optimizer: torch.optim.Optimizer, leaf: nn.Parameter, gradients: list[Tensor]) -> Tensor:
    """`leaf` after a step with each gradient."""
    for gradient in gradients:
        leaf.grad = gradient.clone().view_as(leaf)
        optimizer.step()
    return leaf.detach().clone()


def twin(start: Tensor, gradients: list[Tensor], *, size: str, nesterov: bool, decay: float) -> Tensor:
    """The same in float64: a round takes each singular value s to 3.4445 s - 4.775 s^3 + 2.0315 s^5."""
    value, moment = start.double(), torch.zeros_like(start, dtype=torch.float64)
    factor = 1.0 if size == "spectral" else 0.2 * max(start.shape) ** 0.5
    for gradient in gradients:
        moment = 0.9 * moment + 0.1 * gradient.double()
        u, s, vh = torch.linalg.svd(0.1 * gradient.double() + 0.9 * moment if nesterov else moment, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        value = value * (1 - 0.1 * decay) - 0.1 * factor * (u * s) @ vh
    return value


@settings(max_examples=100, deadline=None)
@given(
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    steps=st.integers(1, 3),
    size=st.sampled_from(["spectral", "rms"]),
    nesterov=st.booleans(),
    decay=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 99),
)
def test_a_matrix_moves_as_its_singular_values_say(
    height: int, width: int, steps: int, size: Any, nesterov: bool, decay: float, seed: int
) -> None:
    torch.manual_seed(seed)
    start = torch.randn(height, width)
    gradients = [torch.randn(height, width) for _ in range(steps)]
    leaf = nn.Parameter(start.clone())
    rule = Muon(momentum=0.9, nesterov=nesterov, size=size)
    mine = moved(rule.optimizer({"w": leaf}, learning_rate=0.1, weight_decay=decay), leaf, gradients)
    right = twin(start, gradients, size=size, nesterov=nesterov, decay=decay)
    assert torch.allclose(mine.double(), right, atol=2e-3)


@pytest.mark.parametrize(
    ("shape", "size"), [((48, 48), "spectral"), ((48, 48), "rms"), ((16, 64), "rms"), ((64, 16), "rms")]
)
def test_a_matrix_moves_as_by_pytorchs_muon(shape: tuple[int, int], size: Any) -> None:
    """PyTorch rounds each round of Newton-Schulz to bfloat16, which the next amplifies: a fifth of what was moved."""
    torch.manual_seed(0)
    gradients = [torch.randn(shape) for _ in range(3)]
    ours, theirs = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
    mine = moved(Muon(size=size).optimizer({"w": ours}, learning_rate=0.1, weight_decay=0.0), ours, gradients)
    adjust = "original" if size == "spectral" else "match_rms_adamw"
    right = moved(torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, adjust_lr_fn=adjust), theirs, gradients)
    assert (mine - right).norm() <= 0.2 * right.norm()
    assert 0.9 < mine.norm() / right.norm() < 1.1


def test_each_block_is_a_matrix_and_columns_of_one_weight_are_one_together() -> None:
    torch.manual_seed(0)
    blocks, columns = torch.randn(5, 8, 4), torch.randn(6, 16, 1)
    for packed, matrices in ((blocks, list(blocks)), (columns, [columns.squeeze(2)])):
        leaf, alone = nn.Parameter(torch.zeros_like(packed)), [nn.Parameter(torch.zeros_like(m)) for m in matrices]
        together = moved(Muon().optimizer({"w": leaf}, learning_rate=1.0, weight_decay=0.0), leaf, [packed] * 2)
        apart = [
            moved(Muon().optimizer({"w": p}, learning_rate=1.0, weight_decay=0.0), p, [m] * 2)
            for p, m in zip(alone, matrices)
        ]
        assert torch.allclose(together.flatten(), torch.stack(apart).flatten(), atol=1e-6)
        values = torch.linalg.svdvals(apart[0])
        assert 0.5 < values.min() / values.max() <= 1


def test_blocks_cut_at_the_edge_are_matrices_of_their_own_size() -> None:
    """Of 10 x 20 in thirds: two blocks of 4 x 7, one of 2 x 6; also after a deep copy."""
    torch.manual_seed(0)
    tuning = copy.deepcopy(attach(nn.Sequential(nn.Linear(20, 10, bias=False)), {"diablo": {"blocks": 3}}))
    region, (leaf,) = tuning.plan["0.weight"], tuning.parameters()
    gradient, offset = torch.randn(10, 20), torch.zeros(10, 20)
    optimizer = Muon().optimizer(tuning.named_leaves(), learning_rate=1.0, weight_decay=0.0)
    region.scatter_(offset, moved(optimizer, leaf, [region.gather(gradient)]))
    for rows, columns in (
        (slice(0, 4), slice(0, 7)),
        (slice(4, 8), slice(7, 14)),
        (slice(8, 10), slice(14, 20)),
    ):
        alone = nn.Parameter(torch.zeros_like(gradient[rows, columns]))
        moved(Muon().optimizer({"w": alone}, learning_rate=1.0, weight_decay=0.0), alone, [gradient[rows, columns]])
        assert torch.allclose(offset[rows, columns], alone, atol=1e-6)


def test_the_rate_is_five_times_the_mean_size_of_a_step() -> None:
    torch.manual_seed(0)
    leaf = nn.Parameter(torch.zeros(40, 64, 1))
    step = moved(Muon().optimizer({"w": leaf}, learning_rate=0.01, weight_decay=0.0), leaf, [torch.randn(40, 64)])
    assert 0.7 * 0.002 < step.square().mean().sqrt() < 1.2 * 0.002


def test_a_gradient_of_zero_moves_nothing() -> None:
    leaf = nn.Parameter(torch.ones(3, 4, 4))
    still = moved(Muon().optimizer({"w": leaf}, learning_rate=1.0, weight_decay=0.0), leaf, [torch.zeros(3, 4, 4)])
    assert torch.equal(still, torch.ones(3, 4, 4))


def test_what_is_no_matrix_is_refused(folder: Path, tmp_path: Path) -> None:
    method = {"random_entries": {}}
    with pytest.raises(ThriftyError, match=r"Muon moves matrices, but what is trained of .* has shape \(\d+,\)"):
        train(configuration(folder, method=method, optim="muon", output_dir=str(tmp_path)))


def test_a_name_that_is_nearly_muon_is_corrected(folder: Path) -> None:
    with pytest.raises(ThriftyError, match=r"optim must be 'muon' or one of adamw_torch, .*; did you mean 'muon'"):
        train(configuration(folder, optim="moun"))
