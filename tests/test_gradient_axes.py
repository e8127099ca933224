"""Cores: axes of the probe's own gradient, a model that is W + left R right, and a delta that says so exactly."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from families import batches, build
from tiny_run import configuration, prepare
from torch import Tensor, nn

from thrifty import attach
from thrifty.core.errors import ThriftyError
from thrifty.core.plan import plan_from_files, plan_to_files
from thrifty.core.projected import Projected
from thrifty.delta import Delta
from thrifty.optim import Muon
from thrifty.run.train import train
from thrifty.update.tuning import Tuning

DATA = batches(3, 4, 10)


def attached(model: nn.Module, *, budget: float | int | None = None, **options: object) -> Tuning:
    made = attach(model, {"gradient_axes": options}, budget=budget, batches=DATA, seed=1)
    assert isinstance(made, Tuning)
    return made


def regions(tuning: Tuning) -> dict[str, Projected]:
    return {name: region for name, region in tuning.plan.items() if isinstance(region, Projected)}


def mean_gradients(model: nn.Module, names: list[str]) -> list[Tensor]:
    """Of the units of four rows, each its own mean loss."""
    parameters = dict(model.double().named_parameters())
    chosen = [parameters[name].requires_grad_(True) for name in names]
    grads = [torch.autograd.grad(model(**batch).loss, chosen) for batch in DATA]
    return [torch.stack(found).mean(0) for found in zip(*grads, strict=True)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_axes_are_the_main_ones_of_the_mean_gradient(family: str) -> None:
    model = build(family, layers=1)
    exact = copy.deepcopy(model)
    tuning = attached(model, r=3)
    found = regions(tuning)
    for region, gradient in zip(found.values(), mean_gradients(exact, list(found)), strict=True):
        left, right = region.left.double(), region.right.double()
        assert region.core == (3, 3)
        torch.testing.assert_close(left.t() @ left, torch.eye(3, dtype=torch.float64), atol=1e-5, rtol=0)
        torch.testing.assert_close(right @ right.t(), torch.eye(3, dtype=torch.float64), atol=1e-5, rtol=0)
        best = torch.linalg.svdvals(gradient)[:3].square().sum()
        assert (left.t() @ gradient @ right.t()).square().sum() > 0.99 * best


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_is_the_one_with_the_product_in_its_weights(family: str) -> None:
    model = build(family, layers=2)
    plain = copy.deepcopy(model).double()
    tuning = attached(model, r=4)
    leaves = tuning.named_leaves()
    with torch.no_grad():
        for k, leaf in enumerate(leaves.values()):
            leaf.copy_(0.3 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(k)))
    weights = dict(plain.named_parameters())
    for name, region in regions(tuning).items():
        weights[name].data += region.left.double() @ leaves[name].detach().double() @ region.right.double()
    (batch,) = batches(1, 4, 10, seed=5)
    value, expected = model(**batch).loss, plain(**batch).loss
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    value.backward()
    expected.backward()
    for name, region in regions(tuning).items():
        dense = weights[name].grad
        gradient = leaves[name].grad
        assert dense is not None
        assert gradient is not None
        core = region.left.double().t() @ dense @ region.right.double().t()
        torch.testing.assert_close(gradient.double(), core, rtol=1e-3, atol=1e-6)
    with tuning.base():
        assert model(**batch).loss.item() == build(family, layers=2)(**batch).loss.item()


def test_a_budget_buys_the_largest_cores_and_a_short_side_gives_all_it_has() -> None:
    model = build("llama", layers=1)
    shapes = [tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    for budget in (len(shapes), 900, 6000, 10**9):
        tuning = attached(build("llama", layers=1), budget=budget)
        r = max(max(region.core) for region in regions(tuning).values())
        sizes = {k: sum(min(k, a) * min(k, b) for a, b in shapes) for k in (r, r + 1)}
        assert tuning.trainable_parameters == sizes[r] <= budget
        assert sizes[r + 1] > budget or r == max(map(max, shapes))
        for region in regions(tuning).values():  # also where it is all of the space: still orthonormal
            m, n = region.core
            torch.testing.assert_close(region.left.t() @ region.left, torch.eye(m), atol=1e-5, rtol=0)
            torch.testing.assert_close(region.right @ region.right.t(), torch.eye(n), atol=1e-5, rtol=0)


def test_backward_keeps_the_projected_inputs_alone() -> None:
    tuning = attached(build("llama", layers=1), r=3, target_modules=["down_proj"])
    kept: list[tuple[int, ...]] = []
    (batch,) = batches(1, 2, 7)
    down = tuning.model.get_submodule("model.layers.0.mlp.down_proj")
    x = torch.randn(2, 7, 72)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        down(x).sum().backward()
    assert (2, 7, 72) not in kept
    assert (14, 72) not in kept
    assert any(shape[-1] == 3 and shape[0] in (2, 14) for shape in kept)
    assert tuning.model(**batch).loss.isfinite()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_goes_equally_far_along_all_directions_of_the_momentum(momentum: float) -> None:
    """Against the polar factor in float64. Newton-Schulz leaves singular values between .6 and 1.3 or so."""
    tuning = attached(build("llama", layers=1), r=5, target_modules=["gate_proj"])
    (leaf,) = tuning.parameters()
    optimizer = Muon(momentum=momentum, nesterov=False, size="spectral").optimizer(
        tuning.named_leaves(), learning_rate=0.02, weight_decay=0.0
    )
    moment = torch.zeros(5, 5, dtype=torch.float64)
    for batch in DATA:
        before = leaf.detach().double()
        optimizer.zero_grad()
        tuning.model(**batch).loss.backward()
        assert leaf.grad is not None
        moment = momentum * moment + (1 - momentum) * leaf.grad.double()
        optimizer.step()
        step = before - leaf.detach().double()
        u, _, vh = torch.linalg.svd(moment)
        along = (u.t() @ step @ vh.t()) / 0.02
        assert 0.5 < along.diagonal().min() <= along.diagonal().max() < 1.4
        assert (along - along.diagonal().diag()).abs().max() < 0.1


def test_a_run_takes_the_methods_optimizer_unless_it_names_one(tmp_path: Path) -> None:
    prepare(tmp_path)
    changes: dict[str, object] = {"method": "gradient_axes", "max_steps": 1, "save_steps": 1}
    for folder, more, state in (("own", {}, "momentum_buffer"), ("named", {"optim": "adamw_torch"}, "exp_avg")):
        train(configuration(tmp_path, **changes, **more, output_dir=str(tmp_path / folder)))
        assert state in (tmp_path / folder / "checkpoint-1" / "optimizer.json").read_text(encoding="utf-8")


def test_a_peer_and_a_method_without_steps_of_its_own_take_adamw() -> None:
    tuning = attach(build("llama", layers=1), {"random_blocks": {"block_size": 8}}, budget=0.05)
    assert isinstance(tuning, Tuning)
    assert isinstance(tuning.optimizer(learning_rate=0.1), torch.optim.AdamW)
    cores = attached(build("llama", layers=1), r=2)
    assert not isinstance(cores.optimizer(learning_rate=0.1), torch.optim.AdamW)
    cores.finish()
    pytest.importorskip("peft")
    peer = attach(cores.model, {"peft": {"r": 2}})
    optimizer = peer.optimizer(learning_rate=0.1, weight_decay=0.2)
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert group["params"] == peer.parameters()
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.2)


def test_the_plan_goes_through_files_and_a_delta_is_exact(tmp_path: Path) -> None:
    model = build("llama", layers=2, dtype=torch.bfloat16)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuning = attached(model, budget=0.05)
    record, tensors = plan_to_files(tuning.plan)
    again = plan_from_files(json.loads(json.dumps(record)), tensors)
    assert dict(again) == dict(tuning.plan)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.01)
    model(**DATA[0]).loss.backward()
    optimizer.step()
    tuning.delta().save(tmp_path / "delta")
    tuning.finish()
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = build("llama", layers=2, dtype=torch.bfloat16)
    delta = Delta.load(tmp_path / "delta")
    delta.apply(other)
    assert any(not torch.equal(trained[name], base[name]) for name in base)
    assert all(torch.equal(p, trained[name]) for name, p in other.named_parameters())
    delta.remove(other)
    assert all(torch.equal(p, base[name]) for name, p in other.named_parameters())


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (3, {}, r"budget 3 .* does not buy one number for each of 7 matrices: raise budget to at least 7"),
        (20, {"r": 4}, r"cores of rank 4 hold 112 numbers, more than budget 20 .*allows .*lower r"),
        (None, {"r": 0}, r"r 0 is not valid"),
        (None, {"r": 2, "target_modules": ["lm_head", "embed_tokens"]}, r"embed_tokens.* cannot take a core"),
    ],
)
def test_what_cannot_be_is_said(budget: int | None, options: dict[str, object], message: str) -> None:
    with pytest.raises(ThriftyError, match=message):
        attached(build("llama", layers=1), budget=budget, **options)


@pytest.mark.parametrize(
    "damage",
    [{"left": [4]}, {"left": [40, 0]}, {"right": "4"}, {"left": [41, 3]}],
)
def test_a_damaged_record_is_refused(damage: dict[str, object]) -> None:
    region = next(iter(regions(attached(build("llama", layers=1), r=3)).values()))
    record, both = region.to_files()
    assert Projected.from_files(record, both) == region
    with pytest.raises(ThriftyError, match=r"projected region|are no subspaces"):
        Projected.from_files(record | damage, both)
    with pytest.raises(ThriftyError, match="needs a tensor"):
        Projected.from_files(record, None)
