"""The chunked label-only cross-entropy against the plain one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thrifty.kernels.label_loss import CHUNK_BYTES, chunk_rows, label_loss


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")


def case(
    shape: tuple[int, ...], width: int, vocab: int, kept: float, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(vocab, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) >= kept] = -100
    return hidden, weight, labels, bias


class Sizes(TorchDispatchMode):
    """Records the size of every tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    width=st.integers(1, 9),
    vocab=st.integers(1, 23),
    kept=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    chunk=st.integers(1, 40),
    with_bias=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_equals_plain_cross_entropy(shape, width, vocab, kept, chunk, with_bias, strided, seed) -> None:
    hidden, weight, labels, bias = case(shape, width, vocab, kept, seed)
    if strided:  # every second number of a wider tensor; the labels, tokens first
        hidden = hidden.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_()
        labels = labels.transpose(0, -1).contiguous().transpose(0, -1)
    leaves = [hidden, weight, *([bias] if with_bias else [])]
    ours = label_loss(hidden, weight, labels, bias=bias if with_bias else None, chunk=chunk)
    theirs = plain(hidden, weight, labels, bias if with_bias else None)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, want in zip(torch.autograd.grad(ours * 0.37, leaves), torch.autograd.grad(theirs * 0.37, leaves)):
        torch.testing.assert_close(mine, want, rtol=1e-11, atol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, labels, bias = case((4,), 3, 5, 0.8, seed=1)
    assert torch.autograd.gradcheck(lambda h, w, b: label_loss(h, w, labels, bias=b, chunk=2), (hidden, weight, bias))


def test_all_masked_still_runs_backward() -> None:
    hidden, weight, _, bias = case((2, 3), 4, 7, 1.0, seed=0)
    loss = label_loss(hidden, weight, torch.full((2, 3), -100), bias=bias)
    loss.backward()
    assert loss.item() == 0.0
    for leaf in (hidden, weight, bias):
        assert leaf.grad is not None
        assert leaf.grad.abs().max() == 0.0


@pytest.mark.parametrize("trainable_head", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_equals_plain_in_the_same_setting(trainable_head: bool, autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    hidden, weight, labels, _ = case((3, 20), 40, 97, 0.6, seed=3, dtype=dtype)
    weight.requires_grad_(trainable_head)
    leaves = [hidden, weight] if trainable_head else [hidden]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours = label_loss(hidden, weight, labels, chunk=7)
        theirs = plain(hidden, weight, labels, None)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    exact = torch.autograd.grad(plain(hidden.double(), weight.double(), labels, None), leaves)
    for mine, want, true in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), exact):
        assert mine.dtype == want.dtype == dtype
        # As near to the exact gradient as plain autograd in the same setting.
        assert (mine - true).float().norm() <= 1.05 * (want - true).float().norm()


def test_weight_gradient_is_summed_in_float32() -> None:
    # 512 rows of one: a bfloat16 sum over chunks would stop growing at 256.
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    label_loss(hidden, weight, torch.zeros(512, dtype=torch.long), chunk=1).backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [-256.0, 256.0]


def test_loss_scale_beyond_float16() -> None:
    hidden = torch.zeros(1, 2, dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[2.0**-10, 0.0], [0.0, 0.0]], dtype=torch.float16)
    (label_loss(hidden, weight, torch.tensor([0])) * 2.0**17).backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[-64.0, 0.0]]


def test_nothing_of_tokens_times_vocabulary_exists() -> None:
    tokens, width, vocab = 60, 8, 97
    hidden, weight, labels, bias = case((tokens,), width, vocab, 0.9, seed=0, dtype=torch.float32)
    with Sizes() as training:
        label_loss(hidden, weight, labels, bias=bias, chunk=10).backward()
    with Sizes() as evaluation, torch.no_grad():
        label_loss(hidden, weight, labels, bias=bias, chunk=10)
    with Sizes() as everything:
        plain(hidden, weight, labels, bias).backward()
    assert everything.largest == tokens * vocab
    assert evaluation.largest == 10 * vocab
    assert training.largest == 10 * vocab


def test_chunk_is_chosen_by_bytes() -> None:
    assert chunk_rows(49152) * 49152 * 4 <= CHUNK_BYTES < (chunk_rows(49152) + 1) * 49152 * 4
    assert chunk_rows(10**9) == 1


def test_a_label_outside_the_vocabulary_is_an_error() -> None:
    hidden, weight, labels, _ = case((3,), 4, 7, 1.0, seed=0)
    labels[1] = 7
    with pytest.raises(RuntimeError, match="out of bounds"):
        label_loss(hidden, weight, labels)
