"""`saved_bytes` against counts made by hand."""

from __future__ import annotations

import peft
import pytest
import torch
from families import batches, build
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import thrifty
from thrifty.run.memory import saved_bytes
from thrifty.update.part import InPlaceModule

ROWS, LENGTH, HIDDEN, WIDE = 2, 16, 40, 72
TOKENS = ROWS * LENGTH


class Square(nn.Module):
    """Keeps its input for backward, or a part of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return (x[..., : self.width] ** 2).sum()


def test_a_storage_counts_once_and_whole_and_parameters_do_not_count() -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias=False), Square(4), Square(3))
    x = torch.randn(5, 8)
    with saved_bytes(model, lambda m: isinstance(m, Square)) as saved:
        y = model[0](x)  # keeps x
        loss = model[1](y) + model[2](y)  # both keep y: the second a view of it
        model[1](torch.randn(100, 4, requires_grad=True))  # dropped, so not kept
    assert saved.total == 4 * (5 * 8 + 5 * 4)
    assert saved.by_module == {"1": 4 * 5 * 4}
    assert saved.within == 4 * 5 * 4
    loss.backward()
    assert model[0].weight.grad is not None


def test_a_view_of_a_parameter_or_a_buffer_does_not_count() -> None:
    model = nn.Linear(8, 4, bias=False)
    model.register_buffer("shift", torch.randn(4, 8))
    x = torch.randn(5, 8, requires_grad=True)
    model.requires_grad_(False)
    with saved_bytes(model) as saved:
        kept = [x @ model.weight.t(), x @ model.shift.t()]
    assert all(y.requires_grad for y in kept)
    assert saved.total == 0


def test_hooks_are_gone_afterwards_and_gradients_are_the_same() -> None:
    model = nn.Sequential(Square(4))
    x = torch.randn(5, 4, requires_grad=True)
    with pytest.raises(TypeError), saved_bytes(model, lambda _: True):
        model(None)
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks
    with saved_bytes(model, lambda _: True) as saved:
        y = model(x)
    assert saved.by_module == {"0": 4 * 5 * 4}  # the innermost of the two that were chosen
    y.backward()
    assert torch.equal(x.grad, 2 * x.detach())


def test_strips_that_modules_share_count_once() -> None:
    """q/k/v read one input: from the second step on they keep one strip, the union of their columns."""
    (batch,) = batches(1, rows=ROWS, length=LENGTH)
    model = build("llama", layers=1)
    tuning = thrifty.attach(
        model,
        {"random_blocks": {"block_size": 8, "target_modules": ["q_proj", "k_proj", "v_proj"]}},
        budget=512,
    )
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.01)
    counted = []
    for _ in range(2):
        with saved_bytes(model, lambda m: isinstance(m, InPlaceModule)) as saved:
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        counted.append(saved)
    columns = [
        {8 * int(c // 8) for g in tuning.plan[name].groups(model.get_parameter(name).shape) for c in g.cols}
        for name in tuning.plan
    ]
    assert len(columns) > 1
    assert counted[0].within == 4 * TOKENS * 8 * sum(map(len, columns))
    assert counted[1].within == 4 * TOKENS * 8 * len(set().union(*columns))
    assert counted[0].total - counted[0].within == counted[1].total - counted[1].within > 0


def test_lora_keeps_whole_inputs_and_its_own_middle() -> None:
    (batch,) = batches(1, rows=ROWS, length=LENGTH)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(build("llama", layers=1), lora)
    with saved_bytes(model, lambda m: isinstance(m, BaseTunerLayer)) as saved:
        loss = model(**batch).loss
    middle = 4 * TOKENS * 2
    assert loss.requires_grad
    prefix = "base_model.model.model.layers.0"
    assert saved.by_module == {
        f"{prefix}.self_attn.q_proj": 4 * TOKENS * HIDDEN + middle,
        f"{prefix}.self_attn.v_proj": middle,  # its input is kept by q_proj already
        f"{prefix}.mlp.down_proj": 4 * TOKENS * WIDE + middle,
    }


def test_a_sparse_tensor_counts_as_its_indices_and_values() -> None:
    """PEFT's SHiRA saves one."""

    class Sparse(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.made = torch.sparse_coo_tensor([[0, 2], [1, 0]], [2.0, 3.0], (3, 4))
            return torch.sparse.mm(self.made, x)

    module = Sparse()
    x = torch.randn(4, 5, requires_grad=True)
    with saved_bytes(module) as saved:
        out = module(x)
    assert saved.total >= 2 * 2 * 8 + 2 * 4
    out.sum().backward()
