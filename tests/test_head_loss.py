"""Which kernel makes the loss of a plain head, and what Liger's is given. No GPU is used."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import batches, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thrifty.kernels.label_loss import label_loss
from thrifty.objective import head_loss as module
from thrifty.objective import install, loss_of, prepare
from thrifty.objective.head_loss import head_loss


class Plain:
    """What Liger's function computes, and how often it was called; the signature is that of liger-kernel 0.8.5."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
    ) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        assert input.dim() == 2
        assert target.shape == input.shape[:1]
        assert len(target) > 0
        assert input.dtype == weight.dtype
        assert (target != ignore_index).all()
        self.calls += 1
        return F.cross_entropy(
            F.linear(input, weight, bias).float(), target, ignore_index=ignore_index, reduction=reduction
        )


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Plain:
    """Liger installed, and this machine's CPU taken for its device."""
    plain = Plain()
    monkeypatch.setattr(module, "_DEVICES", ("cpu",))
    monkeypatch.setattr(module, "_liger", lambda: plain)
    return plain


def drawn(
    *, frozen: bool, with_bias: bool, labels: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*labels.shape, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(13, 8, generator=generator).to(dtype).requires_grad_(not frozen)
    bias = torch.randn(13, generator=generator).to(dtype).requires_grad_(not frozen) if with_bias else None
    return hidden, weight, bias


@settings(max_examples=60, deadline=None)
@given(
    st.booleans(),
    st.booleans(),
    st.lists(st.lists(st.integers(-1, 12), min_size=5, max_size=5), min_size=1, max_size=4),
)
def test_the_fused_path_is_the_plain_one(frozen: bool, with_bias: bool, drawn_labels: list[list[int]]) -> None:
    labels = torch.tensor(drawn_labels)
    labels[labels < 0] = -100
    plain = Plain()
    found = []
    for fused in (True, False):
        hidden, weight, bias = drawn(frozen=frozen, with_bias=with_bias, labels=labels)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_DEVICES", ("cpu",))
            patch.setattr(module, "_liger", lambda fused=fused: plain if fused else None)
            loss = head_loss(hidden, weight, labels, bias=bias)
        (loss / 3).backward()
        found.append([loss.detach(), *(t.grad for t in (hidden, weight, bias) if t is not None and t.requires_grad)])
    assert plain.calls == int((labels != -100).any())
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


LABELS = torch.tensor([[1, -100, 3]])


def test_liger_is_taken_where_its_gradients_are_whole(liger: Plain) -> None:
    hidden, weight, _ = drawn(frozen=False, with_bias=False, labels=LABELS)
    head_loss(hidden, weight, LABELS)
    assert liger.calls == 1
    head_loss(hidden.detach(), weight, LABELS).backward()
    assert liger.calls == 1, "it would make no gradient for the head alone"
    assert weight.grad is not None
    with torch.no_grad():
        head_loss(hidden.detach(), weight, LABELS)
    assert liger.calls == 2, "evaluation"
    head_loss(*drawn(frozen=True, with_bias=False, labels=LABELS, dtype=torch.float64)[:2], LABELS)
    assert liger.calls == 2, "it has no float64"


def test_autocast_decides_the_dtype(liger: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def fused(input: Tensor, weight: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
        seen.append(input.dtype)
        return liger(input, weight, target, **kwargs)

    monkeypatch.setattr(module, "_liger", lambda: fused)
    hidden, weight, _ = drawn(frozen=False, with_bias=False, labels=LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        head_loss(hidden, weight, LABELS).backward()
    assert seen == [torch.bfloat16]
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.float32, torch.float32)


def test_not_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_liger", lambda: pytest.fail("looked for on a CPU"))
    hidden, weight, _ = drawn(frozen=False, with_bias=False, labels=LABELS)
    torch.testing.assert_close(head_loss(hidden, weight, LABELS), label_loss(hidden, weight, LABELS))


def test_a_model_with_a_plain_head_takes_it_and_others_do_not(liger: Plain) -> None:
    for family, calls in (("llama", 1), ("gemma2", 0)):
        model = build(family)
        install(model, prepare(model))
        liger.calls = 0
        loss_of(model, batches(1, 2, 9)[0])
        assert liger.calls == calls, family


_INTERPRETED = """
import sys
import torch
import thrifty.objective.head_loss as module
from thrifty.kernels.label_loss import label_loss

module._DEVICES = ("cpu",)
assert module._liger() is not None
for frozen in (True, False):
    torch.manual_seed(0)
    hidden, labels = torch.randn(2, 9, 16, requires_grad=True), torch.randint(0, 37, (2, 9))
    weight, bias = (torch.randn(*shape).requires_grad_(not frozen) for shape in ((37, 16), (37,)))
    labels[0, :4] = -100
    found = []
    for loss_of in (module.head_loss, label_loss):
        tensors = [t for t in (hidden, weight, bias) if t.requires_grad]
        loss = loss_of(hidden, weight, labels, bias=bias)
        found.append([loss, *torch.autograd.grad(loss / 7, tensors)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
"""


def test_the_real_kernel_in_tritons_interpreter() -> None:
    """Where liger-kernel is installed. A process of its own, since Triton reads its setting when it is imported."""
    pytest.importorskip("liger_kernel")
    run = subprocess.run(
        [sys.executable, "-c", _INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_the_stand_in_has_ligers_signature() -> None:
    functional = pytest.importorskip("liger_kernel.transformers.functional")
    theirs = list(inspect.signature(functional.liger_fused_linear_cross_entropy).parameters)
    ours = list(inspect.signature(Plain.__call__).parameters)[1:]
    assert theirs[: len(ours)] == ours
