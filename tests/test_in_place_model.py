"""Whole models in place: finish, ties, heads, encoders, readers past the module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from attached import BATCH, random_blocks, step
from contract_cells import logits, summed_loss
from families import build, classifier_batches
from torch import Tensor, nn

from thrifty import attach
from thrifty.core.errors import ThriftyError
from thrifty.core.plan import Plan
from thrifty.core.region import Blocks, Region, Whole
from thrifty.update.tuning import attach_with


@pytest.mark.parametrize("method", ["full", {"random_blocks": {"block_size": 8}}], ids=str)
def test_finish_restores_classes_and_requires_grad(method: Any) -> None:
    model = build("gpt2", layers=2)
    model.transformer.wte.weight.requires_grad_(False)
    model.transformer.h[0].mlp.c_fc.bias.requires_grad_(False)
    kinds, names = [type(m) for m in model.modules()], [n for n, _ in model.named_parameters()]
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    state = [sorted(m.__dict__) for m in model.modules()]
    tuning = attach(model, method, budget=0.05 if method != "full" else None)
    if method != "full":
        assert [type(m) for m in model.modules()] != kinds
        assert all(isinstance(m, kind) for m, kind in zip(model.modules(), kinds, strict=True))
    step(tuning, torch.optim.SGD(tuning.parameters(), lr=0.1))
    assert tuning.finish() is model
    assert [type(m) for m in model.modules()] == kinds
    assert [n for n, _ in model.named_parameters()] == names
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    assert [sorted(m.__dict__) for m in model.modules()] == state
    for call in (tuning.parameters, tuning.finish, tuning.sync, tuning.delta):
        with pytest.raises(ThriftyError, match="this tuning is finished: attach the model again"):
            call()
    attach(model, "random_blocks", budget=0.1)


def test_a_model_is_attached_once() -> None:
    model, tuning = random_blocks()
    with pytest.raises(ThriftyError, match="attached already: call finish"):
        attach(model, "full")
    tuning.finish()
    attach(model, "full").finish()


class DataWriter:
    """An optimizer that PyTorch does not know and that writes `.data`."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        self.parameters, self.lr = parameters, lr

    def step(self) -> None:
        for p in self.parameters:
            p.data = p.data - self.lr * p.grad

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None


def test_an_optimizer_that_writes_data_trains_as_one_that_pytorch_knows() -> None:
    results = []
    for make in (lambda ps: torch.optim.SGD(ps, lr=0.5), lambda ps: DataWriter(ps, 0.5)):
        model, tuning = random_blocks()
        optimizer = make(tuning.parameters())
        for _ in range(3):
            step(tuning, optimizer)
        results.append(logits(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adafactor])
def test_a_sub_module_called_directly_sees_the_new_values(optimizer: Any) -> None:
    model, tuning = random_blocks(target_modules=["q_proj"])
    module = model.get_submodule(next(iter(tuning.plan)).removesuffix(".weight"))
    x = torch.randn(4, 40)
    step(tuning, optimizer(tuning.parameters(), lr=0.1))
    start = build("llama", layers=2).get_parameter(next(iter(tuning.plan)))
    (leaf,) = [leaf for name, leaf in tuning.named_leaves().items() if name == next(iter(tuning.plan))]
    expected, region = start.detach().clone(), tuning.plan[next(iter(tuning.plan))]
    region.scatter_(expected, region.gather(expected) + leaf.detach())
    with torch.no_grad():
        assert torch.equal(module(x), x @ expected.t())
        assert torch.equal(module.weight, expected)


@pytest.mark.parametrize("family", ["bert_classifier", "bert_encoder"])
@pytest.mark.parametrize("method", [{"smt": {"block_size": 8}}, "full"], ids=str)
def test_encoders_and_classifiers_attach(family: str, method: Any) -> None:
    (batch,) = classifier_batches(1, 4, 9)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if family == "bert_classifier":
            return model(**batch).loss
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        return model(**inputs).last_hidden_state.square().mean()

    model, twin = build(family, layers=2), build(family, layers=2)
    budget = None if method == "full" else 0.02
    tuning = attach_with(model, method, budget=budget, batches=[batch], loss=loss)
    loss(model, batch).backward()
    loss(twin, batch).backward()
    dense = {name: p.grad for name, p in twin.named_parameters()}
    for name, leaf in tuning.named_leaves().items():
        if dense[name] is not None:
            torch.testing.assert_close(leaf.grad, tuning.plan[name].gather(dense[name]).view_as(leaf), msg=name)
    torch.optim.SGD(tuning.parameters(), lr=0.1).step()
    delta = tuning.delta()
    trained = tuning.finish().state_dict()
    applied = delta.apply(build(family, layers=2)).state_dict()
    assert all(torch.equal(applied[key], trained[key]) for key in trained)


PATTERN = Blocks((8, 8), torch.tensor([[0, 0], [1, 2], [5, 4], [12, 1]]))  # 97 rows: the last one is ragged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("region", [PATTERN, Whole()], ids=["blocks", "whole"])
@pytest.mark.parametrize(
    ("family", "name"), [("gpt2", "transformer.wte.weight"), ("gemma2", "model.embed_tokens.weight")]
)
def test_tied_head_and_embedding_give_the_dense_gradient(family: str, name: str, region: Region, dtype: Any) -> None:
    model, twin = build(family, dtype, layers=1), build(family, dtype, layers=1)
    tuning = attach_with(model, "full", plan=Plan.of(model, {name: region}))
    summed_loss(model, BATCH).backward()
    summed_loss(twin, BATCH).backward()
    (leaf,) = tuning.parameters()
    expected = region.gather(twin.get_parameter(name).grad).view_as(leaf).to(leaf.dtype)
    tolerance = {"rtol": 2e-2, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(leaf.grad, expected, **tolerance)
    torch.optim.SGD([leaf], lr=0.1).step()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    with torch.no_grad():
        assert head.weight.data_ptr() == embedding.weight.data_ptr()
    tuning.finish()
    assert head.weight is embedding.weight
    assert type(head) is nn.Linear


def test_a_head_that_is_read_directly_is_trained_all_the_same() -> None:
    """TRL reads `lm_head.weight` past the module's forward."""
    model, twin = build("llama", layers=1), build("llama", layers=1)
    tuning = attach(model, {"random_blocks": {"target_modules": ["lm_head"], "block_size": 8}}, budget=0.05)
    for net in (model, twin):
        hidden = net.model(input_ids=BATCH["input_ids"]).last_hidden_state
        nn.functional.linear(hidden, net.lm_head.weight).square().sum().backward()
    ((name, leaf),) = tuning.named_leaves().items()
    torch.testing.assert_close(leaf.grad, tuning.plan[name].gather(twin.lm_head.weight.grad).view_as(leaf))
    tuning.check_gradients()


class Reads(nn.Module):
    """Computes with its layer's weight, past the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.called(x), self.read.weight)


def test_a_parameter_read_past_its_module_is_named() -> None:
    model = Reads()
    block = Blocks((4, 4), torch.tensor([[0, 0]]))
    plan = Plan.of(model, {"called.weight": block, "read.weight": block})
    tuning = attach_with(model, "random_blocks", plan=plan)
    model(torch.randn(3, 8)).sum().backward()
    with pytest.raises(
        ThriftyError, match=r"1 of 2 trained tensors got no gradient .*, first read\.weight.*leave them"
    ):
        tuning.check_gradients()


def test_weight_decay_pulls_to_the_pretrained_values() -> None:
    _, tuning = random_blocks()
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1, weight_decay=1.0)
    step(tuning, optimizer)
    away = [float(leaf.detach().norm()) for leaf in tuning.parameters()]
    for _ in range(20):
        for leaf in tuning.parameters():
            leaf.grad = torch.zeros_like(leaf)
        optimizer.step()
    assert all(float(p.detach().norm()) < 0.2 * n for p, n in zip(tuning.parameters(), away, strict=True))


def test_a_small_learning_rate_moves_bfloat16_weights_over_many_steps() -> None:
    model, tuning = random_blocks(dtype=torch.bfloat16)
    name, leaf = next(iter(tuning.named_leaves().items()))
    before = model.get_parameter(name).detach().clone()
    optimizer = torch.optim.SGD([leaf], lr=1e-5)
    for _ in range(400):  # a step is far below the rounding of a weight of 0.2
        leaf.grad = torch.ones_like(leaf)
        optimizer.step()
    region = tuning.plan[name]
    moved = (region.gather(model.get_parameter(name)).float() - region.gather(before).float()).mean()
    assert abs(float(moved) / -4e-3 - 1) < 0.1
    leaf.data.normal_()
    tuning.sync()
    original, offset = region.gather(before), leaf.detach().view(region.packed_shape(before.shape))
    once, twice = (original.float() + offset).to(torch.bfloat16), original + offset.to(torch.bfloat16)
    assert not torch.equal(once, twice)
    assert torch.equal(region.gather(model.get_parameter(name)), once)


def test_a_copy_of_a_whole_model_trains_on_its_own() -> None:
    model, _ = random_blocks("gpt2", target_modules=["c_attn", "wte"], scope="per_matrix")
    copied, untouched = copy.deepcopy(model), logits(model)
    leaves = [p for p in copied.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(leaves, lr=0.5)
    copied(**BATCH).loss.backward()
    assert all(leaf.grad.any() for leaf in leaves)
    optimizer.step()
    assert torch.equal(logits(model), untouched)
    assert not torch.equal(logits(copied), untouched)
