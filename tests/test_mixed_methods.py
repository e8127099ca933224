"""What defines the methods that mix forms: SPT's total meets its budget, SPAFIT's layers train what they should."""

from __future__ import annotations

import pytest
import torch
from families import batches, build
from torch import Tensor

from thrifty import attach
from thrifty.core.entries import Entries
from thrifty.core.errors import ThriftyError
from thrifty.core.low_rank import LowRank
from thrifty.core.region import Whole
from thrifty.select.layers import in_layers, layer_of
from thrifty.select.targets import targets


def sensitivity(family: str) -> dict[str, Tensor]:
    """The sum of squared gradients over probe units of 4 rows, by plain backward passes."""
    model = build(family).eval()
    found = {name: torch.zeros(target.shape) for name, target in targets(model, "all-linear").items()}
    for batch in batches(3, 4, 8):
        model.zero_grad()
        model(**batch).loss.backward()
        for name in found:
            found[name] += dict(model.named_parameters())[name].grad.square()
    return found


@pytest.mark.parametrize("budget", [300, 1000, 5000, 20_000])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_spt_spends_its_budget_and_gives_pairs_where_many_weights_are_sensitive(family: str, budget: int) -> None:
    plan = attach(build(family), {"spt_sensitivity": {"r": 4}}, budget=budget, batches=batches(3, 4, 8)).plan
    scores, matrices = sensitivity(family), dict(targets(build(family), "all-linear"))
    pair = {n: 4 * sum(t.shape) for n, t in matrices.items() if len(t.shape) == 2}
    most = sum(pair.get(name, 10**9) for name in matrices)
    assert plan.trainable_parameters == min(budget, most)
    paired = {name for name, region in plan.items() if isinstance(region, LowRank)}
    single = {name: region for name, region in plan.items() if isinstance(region, Entries)}
    assert paired | set(single) == set(plan)
    # tau: the least sensitive weight that is trained by itself
    if single:
        tau = min(float(scores[name].flatten()[region.index].min()) for name, region in single.items())
        close = 1e-4 * tau
        for name, score in scores.items():
            above, about = int((score > tau + close).sum()), int((score > tau - close).sum())
            if name in paired:
                assert about >= pair[name], name
            else:
                assert above <= (len(single[name].index) if name in single else 0) <= about, name
                assert name not in pair or above < pair[name], name
    assert budget < 5000 or paired


@pytest.mark.parametrize("budget", [300, 1000, 5000])
def test_spt_with_a_threshold_stays_within_its_budget(budget: int) -> None:
    method = {"spt_sensitivity": {"r": 4, "threshold": 0.25}}
    plan = attach(build("llama"), method, budget=budget, batches=batches(3, 4, 8)).plan
    assert 0.95 * budget <= plan.trainable_parameters <= budget
    for name, region in plan.items():
        if isinstance(region, Entries):
            assert len(region.index) < 0.25 * 4 * sum(plan.shapes[name]) + 1


def test_spt_says_what_is_wrong() -> None:
    data = batches(1, 2, 8)
    for options, expected in (({"r": 0}, "r 0"), ({"threshold": 2}, "threshold 2"), ({"alpha": 0}, "alpha 0")):
        with pytest.raises(ThriftyError, match=expected):
            attach(build("llama"), {"spt_sensitivity": options}, batches=data)


def test_spafit_trains_by_depth() -> None:
    plan = attach(build("gpt2"), {"spafit": {"r": 2}}).plan
    assert {layer_of(name) for name in plan} == {1, 2}
    for name, region in plan.items():
        if name.endswith("bias"):
            assert isinstance(region, Whole)
        else:
            assert (layer_of(name), region) == (2, LowRank(2, 16.0))
            assert name.endswith("c_attn.weight")
    names = {n for n, _ in build("gpt2").named_parameters() if n.endswith("bias") and layer_of(n) in (1, 2)}
    assert names == {name for name in plan if name.endswith("bias")}
    text = str(plan)
    assert "whole" in text
    assert "layers 1-2" in text
    assert "low_rank r=2" in text


def test_spafit_on_a_model_without_biases_says_what_to_change() -> None:
    with pytest.raises(ThriftyError, match="no biases at all, but norms"):
        attach(build("llama"), "spafit")
    plan = attach(build("llama"), {"spafit": {"vectors": "norms", "middle": 0, "top": "1:", "r": 2}}).plan
    assert {layer_of(name) for name in plan} == {0, 1, 2}
    assert {name.split(".")[4] for name, region in plan.items() if isinstance(region, LowRank)} == {"q_proj", "v_proj"}


def test_layers_by_share() -> None:
    names = [f"layers.{i}.w" for i in range(10)]
    assert in_layers(names, "1/3:2/3") == {f"layers.{i}.w" for i in (3, 4, 5)}
    assert in_layers(names, ":1/2") | in_layers(names, "1/2:") == set(names)
    with pytest.raises(ThriftyError, match="empty"):
        in_layers(names[:2], ":1/3")
    with pytest.raises(ThriftyError, match="outside"):
        in_layers(names, "1/3:5/3")
    with pytest.raises(ThriftyError, match="not valid"):
        in_layers(names, "1/0:")
