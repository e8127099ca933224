"""The probe: how much lives at once, what it leaves behind, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import batches, build
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thrifty import attach
from thrifty.core.errors import ThriftyError
from thrifty.kernels.region_grad import block_sums
from thrifty.select import probe as probe_room
from thrifty.select.entry_sums import EntrySums
from thrifty.select.probe import STATISTICS, run_probe
from thrifty.select.targets import targets


class LiveBytes(TorchDispatchMode):
    """The most bytes that lived at once: in `.grad`, and in any storage that holds a matrix's worth of numbers."""

    def __init__(self, model: nn.Module, numbers: set[int]) -> None:
        super().__init__()
        self.parameters, self.numbers = list(model.parameters()), numbers
        self.own = {p.untyped_storage().data_ptr() for p in self.parameters}
        self.live: dict[int, tuple[int, int]] = {}  # address -> weak reference to the storage, its bytes
        self.peak = self.grad_peak = self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.live = {at: kept for at, kept in self.live.items() if not torch.UntypedStorage._expired(kept[0])}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                known = self.own | self.live.keys()
                if storage.nbytes() // tensor.itemsize in self.numbers and storage.data_ptr() not in known:
                    self.live[storage.data_ptr()] = (storage._weak_ref(), storage.nbytes())
                    self.seen += 1
        self.peak = max(self.peak, sum(bytes_ for _, bytes_ in self.live.values()))
        self.grad_peak = max(self.grad_peak, sum(p.grad.nbytes for p in self.parameters if p.grad is not None))
        return out


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_live_gradients_never_exceed_the_largest_matrix(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_room, "_CHUNK", 64)  # so that what is being reduced is small beside these tiny matrices
    model = build(family, layers=8)
    chosen = targets(model, "all-linear")
    numbers = {model.get_parameter(name).numel() for name in chosen}
    data = batches(2, 4, 11)
    length, experts = max(int(b["attention_mask"].sum(1).max()) for b in data), getattr(model.config, "num_experts", 4)
    sizes = {40, 20, 72, 120, 144, 97, 4 * experts}
    assert not numbers & {4 * length * n * k for n in sizes for k in (1, 2)}, "an activation looks like a matrix"
    largest = max(model.get_parameter(name).nbytes for name in chosen)
    with LiveBytes(model, numbers) as watch:
        probe = run_probe(
            model, data, grids=dict.fromkeys(chosen, (8, 8)), statistics=["abs_grad", "weight_times_grad"]
        )
    assert probe.units == 2
    assert watch.seen >= 2 * len(chosen)  # every gradient of every unit was seen
    assert 0 < watch.grad_peak <= largest
    assert watch.peak <= largest
    model(**data[0]).loss.backward()  # what the probe is spared
    assert sum(p.grad.nbytes for p in model.parameters()) > 10 * largest


def hooks(model: nn.Module) -> list[list[int]]:
    return [[*m._forward_pre_hooks, *m._forward_hooks, *m._backward_hooks] for m in model.modules()]


def snapshot(model: nn.Module) -> list[Any]:
    weights = [(n, p, p.detach().clone(), p.requires_grad, p.grad) for n, p in model.named_parameters()]
    modules = [(m, type(m), m.training, dict(m.__dict__)) for m in model.modules()]
    return [weights, modules, hooks(model)]


def check_same(model: nn.Module, before: list[Any]) -> None:
    weights, modules, before_hooks = before
    for (name, p), (old_name, old, values, requires, grad) in zip(model.named_parameters(), weights, strict=True):
        assert (name, p.requires_grad) == (old_name, requires)
        assert p is old
        assert torch.equal(p, values)
        assert p.grad is grad
        assert not p._post_accumulate_grad_hooks
    for module, (old, kind, training, state) in zip(model.modules(), modules, strict=True):
        assert module is old
        assert type(module) is kind
        assert module.training is training
        assert module.__dict__.keys() == state.keys()
    assert hooks(model) == before_hooks


def prepared() -> tuple[nn.Module, list[Any]]:
    """A model with frozen parts, modules in evaluation mode and a gradient of its own."""
    model = build("llama", layers=2)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].eval()
    model.lm_head.weight.grad = torch.ones(97, 40)
    return model, snapshot(model)


def test_the_probe_leaves_no_trace() -> None:
    model, before = prepared()
    grids = dict.fromkeys(targets(model, "all-linear"), (8, 8))
    assert run_probe(model, batches(1, 4, 9), grids=grids, statistics=["abs_grad"]).seconds > 0
    check_same(model, before)


class Interrupted(RuntimeError):
    pass


def _breaks(model: nn.Module, batch: Any) -> Tensor:
    loss = model(**batch).loss
    loss.register_hook(lambda g: (_ for _ in ()).throw(Interrupted()))
    return loss


def test_a_probe_that_breaks_in_backward_leaves_no_trace() -> None:
    model, before = prepared()
    grids = dict.fromkeys(targets(model, "all-linear"), (8, 8))
    with pytest.raises(Interrupted):
        run_probe(model, batches(1, 4, 9), grids=grids, statistics=["abs_grad"], loss=_breaks)
    check_same(model, before)


GOOD = batches(1, 4, 9)
FIRST = GOOD[0] | {"labels": torch.full((4, 9), -100).index_fill(1, torch.tensor([0]), 5)}


@pytest.mark.parametrize(
    ("method", "budget", "data", "message"),
    [
        ("smt", 0.02, None, "looks at gradients first: pass batches"),
        ("smt", 0.02, [], "the probe saw no label"),
        ("smt", 0.02, [{k: v for k, v in GOOD[0].items() if k != "labels"}], "needs batches with 'labels'"),
        ("smt", 0.02, [GOOD[0] | {"labels": torch.full((4, 9), -100)}], "every label is -100"),
        ("smt", 0.02, [FIRST], "the probe's gradients are zero everywhere: no label is predicted"),
        ("smt", 2, GOOD, "buys no block, the smallest holds"),
        ("smt", 1.5, GOOD, "budget 1.5 is neither a share"),
        ("smtt", 0.02, GOOD, "unknown method 'smtt'; did you mean 'smt'"),
        ({"smt": {"input_budget": 0.02}}, 0.5, GOOD, r"input_budget 2% \(7 of 384 input columns\) buys no strip"),
        ({"random_blocks": {"input_budget": 0.02}}, 0.5, None, "raise input_budget to at least 2.084%"),
        ({"smt": {"target_modules": ["none"]}}, 0.02, GOOD, "unknown module 'none'"),
        ("full", 0.5, None, "whole tensors hold"),
        ({"peft": {"r": 8}}, 0.001, None, "lower its rank"),
        ({"peft": {"r": 8, "use_dora": True}}, 0.001, None, "lower its rank"),
        ({"peft": {"target_modules": ["nothing"]}}, None, None, "PEFT refuses this LORA configuration"),
        ({"peft": {"peft_type": "LORA", "init_lora_weights": "pissa"}}, None, None, "changes the base weight"),
    ],
)
def test_attach_changes_nothing_if_it_raises(method: Any, budget: Any, data: Any, message: str) -> None:
    model, before = prepared()
    with pytest.raises(ThriftyError, match=message) as error:
        attach(model, method, budget=budget, batches=data)
    assert "\n" not in str(error.value)
    check_same(model, before)
    attach(model, "random_blocks", budget=0.1)  # and it can still be attached


def test_weights_that_overflow_are_named() -> None:
    model, _ = prepared()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    before = snapshot(model)
    with pytest.raises(ThriftyError, match="is not finite: the loss overflows on this data"):
        attach(model, "smt", budget=0.1, batches=GOOD)
    check_same(model, before)


def test_statistics_of_bfloat16_weights_are_summed_in_float32() -> None:
    model = build("llama", torch.bfloat16, layers=1)
    name = "model.layers.0.mlp.up_proj.weight"
    probe = run_probe(model, batches(1, 4, 9), grids={name: (72, 40)}, statistics=["abs_grad"])
    model.eval()
    model(**batches(1, 4, 9)[0]).loss.backward()
    exact = float(model.get_parameter(name).grad.double().abs().sum())
    assert probe.sums["abs_grad"][name].dtype == torch.float64
    assert abs(float(probe.sums["abs_grad"][name]) / exact - 1) < 1e-3


def test_probes_of_halves_add_up_to_the_whole() -> None:
    model, data = build("llama", layers=1), batches(2, 4, 9)
    grids = dict.fromkeys(targets(model, "all-linear"), (8, 8))
    halves = [run_probe(model, [batch], grids=grids, statistics=STATISTICS) for batch in data]
    whole = run_probe(model, data, grids=grids, statistics=STATISTICS)
    for statistic, name in ((s, n) for s in STATISTICS for n in grids):
        found = [probe.sums[statistic][name] for probe in (*halves, whole)]
        first, second, all_ = (sums.read() if isinstance(sums, EntrySums) else sums for sums in found)
        torch.testing.assert_close(all_, first + second)


@pytest.mark.parametrize("shape", [(7, 9), (3, 7, 9), (8, 8)])
@pytest.mark.parametrize(("h", "w"), [(3, 4), (8, 9), (1, 1), (20, 2)])
def test_block_sums_are_the_sums_of_blocks(shape: tuple[int, ...], h: int, w: int) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    found = block_sums(matrix, h=h, w=w)
    assert found.shape == (*shape[:-2], -(-shape[-2] // h), -(-shape[-1] // w))
    for i in range(found.shape[-2]):
        for j in range(found.shape[-1]):
            block = matrix[..., i * h : (i + 1) * h, j * w : (j + 1) * w]
            torch.testing.assert_close(found[..., i, j], block.sum((-2, -1)))


@pytest.mark.parametrize("statistic", ["abs_grad", "attribution"])
def test_the_heap_is_trimmed_before_and_after(statistic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(probe_room, "trim_heap", lambda: seen.append("trim"))
    model, name = build("llama", layers=1), "model.layers.0.mlp.down_proj.weight"
    model.register_forward_pre_hook(lambda *_: seen.append("run"))
    run_probe(model, batches(1, 2, 8), grids={name: (1, 72)}, statistics=[statistic])
    assert seen[0] == seen[-1] == "trim"
    assert set(seen[1:-1]) == {"run"}
