"""One linear layer trained in place, beside the same layer under plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from thrifty.core.plan import Plan
from thrifty.core.region import Blocks
from thrifty.update.tuning import Tuning, attach_with

INPUTS, OUTPUTS = 11, 7
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(INPUTS, OUTPUTS),
    "linear without bias": lambda: nn.Linear(INPUTS, OUTPUTS, bias=False),
    "Conv1D": lambda: Conv1D(OUTPUTS, INPUTS),
}
SHAPES: dict[str, Callable[[], Tensor]] = {
    "1-D": lambda: torch.randn(INPUTS),
    "2-D": lambda: torch.randn(5, INPUTS),
    "4-D": lambda: torch.randn(2, 3, 2, INPUTS),
    "no tokens": lambda: torch.randn(0, INPUTS),
    "transposed": lambda: torch.randn(INPUTS, 5).t(),
    "every second": lambda: torch.randn(3, 4, 2 * INPUTS)[..., ::2],
    "permuted": lambda: torch.randn(4, 3, INPUTS).permute(1, 0, 2),
    "expanded": lambda: torch.randn(1, INPUTS).expand(6, INPUTS),
}


def blocks(layer: nn.Module) -> Blocks:
    """Two blocks, one of them a ragged corner; three input columns of eleven stay unused."""
    index, shape = torch.tensor([[0, 0], [1, 2]]), (4, 4)
    return Blocks(shape, index.flip(1)) if isinstance(layer, Conv1D) else Blocks(shape, index)


def pair(kind: str = "linear", dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, nn.Sequential, Tuning]:
    """A plain model, the same model attached, and its tuning."""
    torch.manual_seed(0)
    plain = nn.Sequential(LAYERS[kind]()).to(dtype)
    if getattr(plain[0], "bias", None) is not None:
        nn.init.normal_(plain[0].bias)
    model = copy.deepcopy(plain)
    plan = Plan.of(model, {"0.weight": blocks(model[0])})
    return plain, model, attach_with(model, "random_blocks", plan=plan)


def expected(plain: nn.Module, tuning: Tuning) -> Tensor:
    leaf = tuning.named_leaves()["0.weight"]
    return tuning.plan["0.weight"].gather(plain[0].weight.grad).view_as(leaf)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", LAYERS)
def test_output_and_all_gradients_for_any_input(kind: str, shape: str) -> None:
    plain, model, tuning = pair(kind)
    strided = SHAPES[shape]()
    inputs = [strided.contiguous().clone().requires_grad_(), strided.detach().requires_grad_()]
    if kind != "linear without bias":
        assert not model[0].bias.requires_grad
        model[0].bias.requires_grad_(True)
    outputs = [net(x) for net, x in zip((plain, model), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    assert torch.equal(*outputs) or not strided.is_contiguous()
    upstream = torch.randn(outputs[0].shape)
    for y in outputs:
        y.backward(upstream)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    torch.testing.assert_close(tuning.parameters()[0].grad, expected(plain, tuning))
    assert model[0].weight.grad is None
    if kind != "linear without bias":
        torch.testing.assert_close(model[0].bias.grad, plain[0].bias.grad)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_accumulate(kind: str) -> None:
    plain, model, tuning = pair(kind)
    for _ in range(3):
        x = torch.randn(4, INPUTS)
        for net in (plain, model):
            net(x).square().sum().backward()
    torch.testing.assert_close(tuning.parameters()[0].grad, expected(plain, tuning))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("held", "autocast"), [(torch.float32, True), (torch.bfloat16, False), (torch.float64, False)])
def test_dtypes(kind: str, held: torch.dtype, autocast: bool) -> None:
    plain, model, tuning = pair(kind, held)
    base = torch.randn(5, INPUTS, dtype=held)
    inputs = [base.clone().requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outputs = [net(x) for net, x in zip((plain, model), inputs, strict=True)]
    assert outputs[1].dtype == (torch.bfloat16 if autocast else held)
    assert torch.equal(*outputs)
    upstream = torch.randn(5, OUTPUTS).to(outputs[0].dtype)
    for y in outputs:
        y.backward(upstream)
    leaf = tuning.parameters()[0]
    assert leaf.dtype == leaf.grad.dtype == (torch.float64 if held == torch.float64 else torch.float32)
    assert inputs[1].grad.dtype == held
    coarse = autocast or held == torch.bfloat16
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if coarse else {}
    torch.testing.assert_close(leaf.grad, expected(plain, tuning).to(leaf.dtype), **tolerance)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **tolerance)


def test_without_gradients_it_is_the_layer_itself() -> None:
    plain, model, tuning = pair()
    x = torch.randn(3, INPUTS)
    with torch.no_grad():
        assert not model(x).requires_grad
        assert torch.equal(model(x), plain(x))
    with torch.inference_mode():
        assert torch.equal(model(x), plain(x))
    tuning.parameters()[0].requires_grad_(False)
    assert not model(x).requires_grad
    x.requires_grad_()
    model(x).sum().backward()  # a frozen leaf still lets the input's gradient through
    torch.testing.assert_close(x.grad, plain[0].weight.detach().sum(0).expand(3, -1))


class Products(TorchDispatchMode):
    """Shapes of the results of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "mm" in str(func):
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("kind", LAYERS)
def test_the_input_gradient_is_computed_only_if_asked_for(kind: str) -> None:
    _, model, _ = pair(kind)
    for asked in (False, True):
        y = model(torch.randn(5, INPUTS, requires_grad=asked))
        with Products() as products:
            y.sum().backward()
        assert ((5, INPUTS) in products.shapes) == asked
        assert products.shapes  # the blocks' own products are seen


def test_a_copied_model_trains_on_its_own() -> None:
    _, model, tuning = pair()
    copied, x = copy.deepcopy(model), torch.randn(4, INPUTS)
    (leaf,) = [p for p in copied.parameters() if p.requires_grad]
    assert leaf is not tuning.parameters()[0]
    optimizer = torch.optim.SGD([leaf], lr=0.1)
    before = model[0].weight.detach().clone()
    copied(x).square().sum().backward()
    optimizer.step()
    assert leaf.any()
    mask = tuning.plan["0.weight"].mask(before.shape)
    assert (copied[0].weight != before)[mask].all()
    assert torch.equal(copied[0].weight[~mask], before[~mask])
    assert torch.equal(model[0].weight, before)
    assert tuning.parameters()[0].grad is None
    leaf.data.mul_(2)  # past the optimizer: the next forward after a backward writes
    copied(x).square().sum().backward()
    assert torch.equal(copied(x), nn.functional.linear(x, copied[0].weight, copied[0].bias))
    trained = (before[mask].double() + 2 * (copied[0].weight[mask] - before[mask]).double() / 2).float()
    torch.testing.assert_close(copied[0].weight[mask], trained)


def test_to_bfloat16_keeps_the_leaf_in_float32() -> None:
    _, model, tuning = pair()
    leaf = tuning.parameters()[0]
    offset = torch.full(leaf.shape, 1 / 3)
    leaf.data.copy_(offset)
    tuning.sync()
    model(torch.randn(3, INPUTS)).sum().backward()
    model.to(torch.bfloat16)
    (leaf,) = tuning.parameters()
    assert leaf.dtype == torch.float32
    assert torch.equal(leaf.detach(), offset)
    assert model[0].weight.dtype == torch.bfloat16
    model(torch.randn(3, INPUTS, dtype=torch.bfloat16)).sum().backward()
    assert leaf.grad.dtype == torch.float32
    torch.optim.SGD([leaf], lr=1e-4).step()
    tuning.delta().apply(pair()[0].to(torch.bfloat16))


def test_the_keys_are_those_of_the_base_and_a_base_checkpoint_resets_the_offset() -> None:
    plain, model, tuning = pair()
    (leaf,) = tuning.parameters()
    leaf.data.normal_()
    tuning.sync()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not torch.equal(model.state_dict()["0.weight"], plain[0].weight)
    trained = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(plain.state_dict(), strict=True)
    assert not leaf.any()
    assert torch.equal(model[0].weight, plain[0].weight)
    model.load_state_dict(trained, strict=True)
    tuning.sync()
    torch.testing.assert_close(model[0].weight, trained["0.weight"])
    assert leaf.any()


def test_what_an_unseen_optimizer_wrote_is_in_the_state_dict() -> None:
    _, model, tuning = pair()
    (leaf,) = tuning.parameters()
    before = model[0].weight.detach().clone()
    model(torch.randn(3, INPUTS)).sum().backward()
    leaf.data.add_(1.0)
    mask = tuning.plan["0.weight"].mask(before.shape)
    torch.testing.assert_close(model.state_dict()["0.weight"], before + mask.float())


def test_values_changed_between_forward_and_backward_raise() -> None:
    _, model, tuning = pair()
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    x = torch.randn(3, INPUTS)
    model(x).sum().backward()
    stale, fresh = model(x).sum(), None
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"values of 0.weight changed between this forward and its backward: call"):
        stale.backward()
    fresh = model(x).sum()
    with tuning.base() as base:
        base(x)
    tuning.sync()  # neither a swap to the base and back nor an identical write makes it stale
    fresh.backward()
    late = model(x).sum()
    tuning.load_state({"0.weight": torch.zeros_like(tuning.parameters()[0])})
    with pytest.raises(RuntimeError, match="changed between this forward and its backward"):
        late.backward()
