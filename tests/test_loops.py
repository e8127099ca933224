"""A bare torch loop trains an attached model to what a plain-autograd twin gives, whoever steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import transformers
from families import batches, build
from torch import Tensor, nn
from twin import TOLERANCE, Pair, effective, relative_difference

import thrifty

Parameters = Iterable[nn.Parameter]


class DataWriter:
    """An optimizer that PyTorch knows nothing of: no class, no hooks, no version counters, only `.data`."""

    def __init__(self, parameters: Parameters, *, lr: float) -> None:
        self.parameters, self.lr = list(parameters), lr

    def step(self) -> None:
        for p in self.parameters:
            assert p.grad is not None
            p.data = p.data - self.lr * p.grad

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None


def adamw(**options: Any) -> Callable[[Parameters], Any]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, **options)


OPTIMIZERS: dict[str, Callable[[Parameters], Any]] = {
    "adamw_fused": adamw(fused=True),
    "adamw_foreach": adamw(foreach=True),
    "adamw_for_loop": adamw(foreach=False, fused=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "transformers_adafactor": lambda p: transformers.Adafactor(p, lr=1e-2, relative_step=False),
    "data_writer": lambda p: DataWriter(p, lr=1e-2),
}
DATA = batches(6, 4, 12)


def attach_options(method: str) -> dict[str, Any]:
    return {"full": {}, "smt": {"budget": 0.02, "batches": DATA[:2]}, "random_blocks": {"budget": 0.02}}[method]


def pair(family: str, dtype: torch.dtype, method: str) -> Pair:
    model = build(family, dtype)
    if family == "mixtral":
        model.set_experts_implementation("eager")  # grouped products know no float64
    return Pair.of(model, method, **attach_options(method))


def loop(model: nn.Module, optimizer: Any, *, accumulate: int = 2) -> list[float]:
    """The losses of each batch of DATA; a step every `accumulate` batches."""
    losses = []
    for i, batch in enumerate(DATA, start=1):
        loss = model(**batch).loss
        (loss / accumulate).backward()
        losses.append(loss.item())
        if i % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def check_against_twin(both: Pair, optimizer: Callable[[Parameters], Any], dtype: torch.dtype) -> None:
    losses = loop(both.tuning.model, optimizer(both.tuning.parameters()))
    of_twin = loop(both.twin, optimizer(both.offsets.values()))
    both.tuning.sync()
    assert losses == pytest.approx(of_twin, abs=TOLERANCE[dtype])
    assert len(set(of_twin)) == len(of_twin)
    assert both.difference() < TOLERANCE[dtype]
    assert both.outside_is_untouched()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains_to_the_twins_values(optimizer: str, family: str) -> None:
    check_against_twin(pair(family, torch.float64, "smt"), OPTIMIZERS[optimizer], torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adamw_fused", "sgd", "data_writer"])
def test_lower_precision_keeps_up_with_the_twin(optimizer: str, dtype: torch.dtype) -> None:
    both = pair("qwen2", dtype, "random_blocks")
    check_against_twin(both, OPTIMIZERS[optimizer], dtype)
    assert {leaf.dtype for leaf in both.tuning.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("optimizer", ["adamw_fused", "data_writer"])
def test_whole_tied_tensors_of_a_bfloat16_base_train_to_the_twins_values(optimizer: str, family: str) -> None:
    check_against_twin(pair(family, torch.bfloat16, "full"), OPTIMIZERS[optimizer], torch.bfloat16)


def test_autocast_trains_to_the_twins_values() -> None:
    both = pair("llama", torch.float32, "smt")
    with torch.autocast("cpu", torch.bfloat16):
        check_against_twin(both, OPTIMIZERS["adamw_fused"], torch.bfloat16)


def test_a_submodule_called_directly_sees_the_step_of_any_optimizer() -> None:
    for optimizer in ("adamw_fused", "data_writer"):
        both = pair("llama", torch.float64, "smt")
        name = next(iter(both.tuning.plan))
        module = both.tuning.model.get_submodule(name.removesuffix(".weight"))
        x = torch.randn(3, module.in_features, dtype=torch.float64)
        stepper = OPTIMIZERS[optimizer](both.tuning.parameters())
        both.tuning.model(**DATA[0]).loss.backward()
        stepper.step()
        with torch.no_grad():
            y = module(x)
        both.tuning.sync()
        assert torch.equal(y, x @ both.tuning.model.get_parameter(name).t())
        assert not torch.equal(y, x @ both.base.get_parameter(name).t())


def test_after_a_step_that_pytorch_does_not_see_whatever_reads_the_model_flushes() -> None:
    def stepped() -> Pair:
        both = pair("llama", torch.float64, "smt")
        optimizer = DataWriter(both.tuning.parameters(), lr=0.1)
        both.tuning.model(**DATA[0]).loss.backward()
        optimizer.step()
        return both

    both = stepped()
    both.tuning.sync()
    trained = effective(both.tuning.model, both.tuning.plan)
    start = effective(both.base, both.tuning.plan)
    assert relative_difference(start, trained, start) == 1

    def same(found: dict[str, Tensor]) -> None:
        assert all(torch.equal(found[name], values) for name, values in trained.items())

    same(stepped().tuning.model.state_dict())
    same(dict(stepped().tuning.delta().apply(build("llama", torch.float64)).named_parameters()))
    same(dict(stepped().tuning.finish().named_parameters()))
    both = stepped()
    with both.tuning.base() as model:
        same_as_base = effective(model, both.tuning.plan)
    assert all(torch.equal(same_as_base[name], values) for name, values in start.items())
    same(effective(both.tuning.model, both.tuning.plan))


def test_weight_decay_pulls_to_the_pretrained_values() -> None:
    both = pair("llama", torch.float64, "smt")
    loop(both.tuning.model, OPTIMIZERS["adamw_fused"](both.tuning.parameters()))
    plan, offsets = both.tuning.plan, both.tuning.state()
    far = {name: values.clone() for name, values in offsets.items()}
    decay = torch.optim.SGD(both.tuning.parameters(), lr=0.5, weight_decay=1.0)
    for _ in range(2):
        for leaf in both.tuning.parameters():
            leaf.grad = torch.zeros_like(leaf)
        decay.step()
    now, start = effective(both.tuning.model, plan), effective(both.base, plan)
    for name, region in plan.items():
        torch.testing.assert_close(offsets[name], far[name] / 4)
        torch.testing.assert_close(region.gather(now[name]), region.gather(start[name]) + far[name] / 4)


def test_clipping_by_the_models_parameters_sees_the_leaves() -> None:
    both = pair("llama", torch.float64, "smt")
    norms = []
    for model in (both.tuning.model, both.twin):
        model(**DATA[0]).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01))
    torch.testing.assert_close(norms[0], norms[1])
    clipped = torch.stack([leaf.grad.norm() for leaf in both.tuning.parameters()]).norm()
    torch.testing.assert_close(clipped, torch.tensor(0.01, dtype=torch.float64))


def test_a_deep_copy_trains_by_itself() -> None:
    both = pair("llama", torch.float64, "smt")
    optimizer = OPTIMIZERS["adamw_fused"](both.tuning.parameters())
    first = loop(both.tuning.model, optimizer)
    before = effective(both.tuning.model, both.tuning.plan)
    copied = copy.deepcopy(both.tuning)
    assert isinstance(copied, thrifty.update.Tuning)
    assert all(a is not b for a, b in zip(copied.parameters(), both.tuning.parameters(), strict=True))
    again = loop(copied.model, OPTIMIZERS["data_writer"](copied.parameters()))
    copied.sync()
    assert again[0] != first[0]
    assert all(torch.equal(effective(both.tuning.model, before)[name], values) for name, values in before.items())
    assert all(not torch.equal(effective(copied.model, before)[name], values) for name, values in before.items())
    straight = loop(both.tuning.model, OPTIMIZERS["data_writer"](both.tuning.parameters()))
    assert straight == again


def test_casting_the_model_does_not_round_the_leaf() -> None:
    both = pair("llama", torch.float32, "smt")
    loop(both.tuning.model, OPTIMIZERS["adamw_fused"](both.tuning.parameters()))
    held = [(leaf, leaf.detach().clone()) for leaf in both.tuning.parameters()]
    both.tuning.model.to(torch.bfloat16)
    for now, (leaf, values) in zip(both.tuning.parameters(), held, strict=True):
        assert now is leaf
        assert torch.equal(now, values)
    assert {p.dtype for p in both.tuning.model.state_dict().values()} == {torch.bfloat16}


def test_a_backward_after_the_step_is_refused() -> None:
    both = pair("llama", torch.float32, "smt")
    optimizer = OPTIMIZERS["adamw_fused"](both.tuning.parameters())
    stale = both.tuning.model(**DATA[0]).loss
    both.tuning.model(**DATA[1]).loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"changed between this forward and its backward"):
        stale.backward()


def test_loading_a_state_without_a_weight_leaves_its_offset_alone() -> None:
    both = pair("llama", torch.bfloat16, "smt")
    loop(both.tuning.model, OPTIMIZERS["adamw_fused"](both.tuning.parameters()))
    held = {name: values.clone() for name, values in both.tuning.state().items()}
    both.tuning.model.load_state_dict({"model.norm.weight": both.base.model.norm.weight}, strict=False)
    assert all(torch.equal(now, held[name]) for name, now in both.tuning.state().items())


def test_loading_a_base_checkpoint_takes_the_offsets_back() -> None:
    both = pair("gpt2", torch.bfloat16, "full")
    loop(both.tuning.model, OPTIMIZERS["adamw_fused"](both.tuning.parameters()))
    both.tuning.model.load_state_dict(both.base.state_dict())
    assert not any(bool(leaf.any()) for leaf in both.tuning.parameters())
    loop(both.tuning.model, OPTIMIZERS["adamw_fused"](both.tuning.parameters()))
    tied = {"lm_head.weight": both.base.lm_head.weight}  # the name of the tied tensor's other holder
    both.tuning.model.load_state_dict(tied, strict=False)
    assert not bool(both.tuning.named_leaves()["transformer.wte.weight"].any())


def test_the_python_example_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, model = build("llama"), build("llama")
    untouched = {name: p.detach().clone() for name, p in base.named_parameters()}

    tuning = thrifty.attach(model, "smt", budget=0.01, batches=DATA, seed=0)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-3)
    for batch in DATA:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(tuning.plan)
    delta = tuning.delta()
    assert tuning.finish() is model
    delta.save(tmp_path / "delta")
    thrifty.Delta.load(tmp_path / "delta").apply(base)
    trained = dict(model.named_parameters())
    assert "numbers trained" in capsys.readouterr().out
    assert {type(module) for module in model.modules()} == {type(module) for module in base.modules()}
    assert all(torch.equal(p, trained[name]) for name, p in base.named_parameters())
    assert any(not torch.equal(p, untouched[name]) for name, p in base.named_parameters())
    delta.remove(base)
    assert all(torch.equal(p, untouched[name]) for name, p in base.named_parameters())


def test_a_compiled_layer_accumulates_without_compiling_again() -> None:
    method = {"smt": {"target_modules": ["layers.1.mlp.down_proj"], "block_size": 16}}
    both = Pair.of(build("llama", torch.float64), method, budget=0.01, batches=DATA[:2])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    both.tuning.model.model.layers[1].mlp.down_proj.compile(backend="aot_eager", fullgraph=True)
    check_against_twin(both, OPTIMIZERS["adamw_fused"], torch.float64)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
