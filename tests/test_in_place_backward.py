"""What backward makes, keeps and enters: no tensor of W's size, one strip for q/k/v, nothing below the lowest block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import batches, build
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thrifty import attach
from thrifty.core.entries import Entries
from thrifty.core.plan import Plan
from thrifty.core.region import Blocks, Region
from thrifty.update.tuning import attach_with

SIDE, TOKENS = 48, 30


class Made(TorchDispatchMode):
    """Numbers in every tensor that an operator makes, views of older storages left out."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.numbers.append((str(func), tensor.untyped_storage().nbytes() // tensor.itemsize))
        return out


PATTERNS = {
    "blocks": Blocks((16, 16), torch.tensor([[0, 0], [1, 2], [2, 2]])),
    "ragged blocks": Blocks((20, 36), torch.tensor([[0, 1], [2, 0], [2, 1]])),
    "small blocks": Blocks((4, 4), torch.tensor([[0, 0], [5, 2], [5, 3], [9, 2]])),
    "columns": Blocks((SIDE, 1), torch.tensor([[0, 3], [0, 7], [0, 40]])),
    "rows": Blocks((1, SIDE), torch.tensor([[3, 0], [20, 0], [47, 0]])),
    "few entries": Entries(torch.tensor([5, SIDE * 3, SIDE * 40 + 7])),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [True, False], ids=["with dx", "without dx"])
def test_no_operator_in_backward_makes_a_tensor_of_the_weights_size(
    pattern: str, dtype: torch.dtype, asked: bool
) -> None:
    """TOKENS < SIDE, so whatever is as large as the square weight is not an activation."""
    model = nn.Sequential(nn.Linear(SIDE, SIDE)).to(dtype)
    attach_with(model, "random_blocks", plan=Plan.of(model, {"0.weight": PATTERNS[pattern]}))
    x = torch.randn(TOKENS, SIDE, dtype=dtype, requires_grad=asked)
    y = model(x)
    with Made() as made:
        y.backward(torch.ones_like(y))
    assert any("mm" in name for name, _ in made.numbers)
    large = [(name, n) for name, n in made.numbers if n >= SIDE * SIDE]
    assert not large, large
    with Made() as dense:  # plain autograd does
        nn.functional.linear(x, model[0].weight.clone().requires_grad_()).sum().backward()
    assert any(n >= SIDE * SIDE for _, n in dense.numbers)


def test_a_whole_model_makes_no_gradient_of_a_weights_size() -> None:
    """Four-layer model: 33 tokens, so no activation is as large as a weight; embedding and loss are looked at too."""
    model = build("llama", layers=4)
    attach(model, {"random_blocks": {"block_size": 8}}, budget=0.02)
    (batch,) = batches(1, 3, 11)
    loss = model(**batch).loss
    sizes = {p.numel() for n, p in model.named_parameters() if "proj" in n and "offset" not in n} | {97 * 40}
    assert not sizes & {33 * n for n in (40, 20, 72, 97)}
    with Made() as made:
        loss.backward()
    assert not [(name, n) for name, n in made.numbers if n in sizes]


def qkv_plan(model: nn.Module, *, layer: int = 0) -> Plan:
    """One block in each of q, k and v of one layer, in different columns."""
    regions: dict[str, Region] = {
        f"model.layers.{layer}.self_attn.{m}_proj.weight": Blocks((8, 8), torch.tensor([[0, i]]))
        for i, m in enumerate("qkv")
    }
    return Plan.of(model, regions)


def strips_of(model: nn.Module, batch: dict[str, Tensor], names: list[str]) -> list[Tensor]:
    """What each of the named modules saves for backward."""
    inside: list[str] = []
    saved: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = []
    for name in names:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
        handles.append(module.register_forward_hook(lambda *_: inside.pop() and None))

    def pack(tensor: Tensor) -> Tensor:
        if inside:
            saved[inside[-1]].append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    loss.backward()
    for handle in handles:
        handle.remove()
    assert all(len(tensors) == 1 for tensors in saved.values())
    return [saved[name][0] for name in names]


def test_q_k_and_v_keep_one_strip_after_the_first_step() -> None:
    model, (batch,) = build("llama", layers=1), batches(1, 3, 11)
    tuning = attach_with(model, "random_blocks", plan=qkv_plan(model))
    names = [name.removesuffix(".weight") for name in tuning.plan]
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    own = strips_of(model, batch, names)
    assert [tuple(strip.shape) for strip in own] == [(33, 8)] * 3
    assert len({strip.untyped_storage().data_ptr() for strip in own}) == 3
    optimizer.step()
    optimizer.zero_grad()
    shared = strips_of(model, batch, names)
    assert [tuple(strip.shape) for strip in shared] == [(33, 24)] * 3
    assert len({strip.untyped_storage().data_ptr() for strip in shared}) == 1
    assert all(leaf.grad.any() for leaf in tuning.parameters())


def test_gradients_are_the_same_before_and_after_strips_are_shared() -> None:
    model, (batch,) = build("qwen2", layers=1), batches(1, 3, 11)
    tuning = attach_with(model, "random_blocks", plan=qkv_plan(model))
    optimizer, found = torch.optim.SGD(tuning.parameters(), lr=0.0), []
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        found.append([leaf.grad.clone() for leaf in tuning.parameters()])
        optimizer.step()
    for grads in found[1:]:
        for one, other in zip(grads, found[0], strict=True):
            torch.testing.assert_close(one, other)


def test_an_input_changed_in_place_is_not_mistaken_for_the_one_before() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    block = Blocks((4, 4), torch.tensor([[0, 0]]))
    tuning = attach_with(model, "random_blocks", plan=Plan.of(model, {"a.weight": block, "b.weight": block}))
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.0)
    for _ in range(2):  # in the second round both read one shared strip, were x still the same
        optimizer.zero_grad()
        x = torch.randn(3, 8)
        first = model["a"](x).sum()
        x.mul_(2)
        (first + model["b"](x).sum()).backward()
        one, other = (leaf.grad for leaf in tuning.parameters())
        torch.testing.assert_close(other, 2 * one)
        optimizer.step()


def entered(model: nn.Module, batch: dict[str, Tensor]) -> list[int]:
    """Layers through whose output a gradient comes back, and whose inside is then differentiated."""
    seen: set[int] = set()
    handles = []
    for i, layer in enumerate(model.model.layers):

        def watch(module: nn.Module, args: Any, out: Any, i: int = i) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            if hidden.requires_grad:
                hidden.register_hook(lambda _: seen.add(i))

        handles.append(layer.mlp.register_forward_hook(watch))
    model(**batch).loss.backward()
    for handle in handles:
        handle.remove()
    return sorted(seen)


def test_backward_enters_no_layer_below_the_lowest_trained_one() -> None:
    model, (batch,) = build("llama", layers=5), batches(1, 3, 11)
    assert entered(model, batch) == [0, 1, 2, 3, 4]
    tuning = attach_with(model, "random_blocks", plan=qkv_plan(model, layer=3))
    assert entered(model, batch) == [3, 4]
    assert all(leaf.grad.any() for leaf in tuning.parameters())


def test_backward_stops_early_with_gradient_checkpointing() -> None:
    model, (batch,) = build("llama", layers=5), batches(1, 3, 11)
    tuning = attach_with(model, "random_blocks", plan=qkv_plan(model, layer=3))
    model(**batch).loss.backward()
    plain = [leaf.grad.clone() for leaf in tuning.parameters()]
    for leaf in tuning.parameters():
        leaf.grad = None
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed: list[int] = []
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, i=i: recomputed.append(i))
    assert entered(model, batch) == [3, 4]
    assert recomputed == [0, 1, 2, 3, 4, 4, 3]
    for leaf, grad in zip(tuning.parameters(), plain, strict=True):
        torch.testing.assert_close(leaf.grad, grad)
