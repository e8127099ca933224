"""Which blocks PEFT's SMT tuner takes: drawn, handed in, saved; and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from smt_small import Small, X, base, layers, train, tuned
from torch import nn

from thrifty.core.errors import ThriftyError
from thrifty.core.plan import Plan
from thrifty.core.region import Blocks, Whole
from thrifty.integrations.peft import SmtConfig
from thrifty.select.targets import Target


def regions(model: nn.Module) -> dict[str, Blocks]:
    return {layer.target.name: layer.smt_regions["default"] for layer in layers(model)}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.booleans()), min_size=1, max_size=4),
    st.sampled_from([0.01, "40%", 2, 300, 1.0]),
    st.sampled_from(["auto", 3, 64, "row", "column", [4, 7]]),
)
def test_drawn_blocks_keep_to_the_budget_but_for_one_each(
    sizes: list[tuple[int, int, bool]], budget: Any, block_size: Any
) -> None:
    targets = {f"m{i}": Target(f"m{i}", size[:2], transposed=size[2]) for i, size in enumerate(sizes)}
    total = sum(rows * columns for rows, columns, _ in sizes)
    config = SmtConfig(budget=budget, block_size=block_size)
    config.choose(targets, total=total)
    drawn = {name: config.region(name, target.shape) for name, target in targets.items()}
    counts = {name: region.size(targets[name].shape) for name, region in drawn.items()}
    ceiling = budget if isinstance(budget, int) else int({"40%": 0.4}.get(str(budget), budget) * total + 1e-9)
    several = [name for name, region in drawn.items() if len(region.index) > 1]
    assert all(len(region.index) >= 1 for region in drawn.values())
    assert sum(counts[name] for name in several) <= ceiling
    again = SmtConfig(**{"selection": config.selection})
    again.choose(targets, total=total)
    assert {name: again.region(name, target.shape) for name, target in targets.items()} == drawn


def test_one_percent_of_a_10_by_20_layer_is_one_block() -> None:
    model = get_peft_model(base(), SmtConfig(target_modules=["lin0"]))
    assert {name: len(region.index) for name, region in regions(model).items()} == {"lin0": 1}


def test_the_seed_decides() -> None:
    one, same, other = (regions(tuned("list", seed=seed)) for seed in (0, 0, 1))
    assert one == same != other


def test_block_pattern_wins_where_it_matches() -> None:
    found = {name: region.shape for name, region in regions(tuned("every")).items()}
    assert found == {"lin0": (4, 4), "mid.0": (1, 15), "mid.1": (4, 4), "lin1": (1, 5)}  # a column of Conv1D is a row


def plan_of(model: nn.Module) -> Plan:
    return Plan.of(
        model,
        {
            "lin0.weight": Blocks((3, 5), torch.tensor([[0, 0], [6, 1], [2, 1]])),
            "mid.1.weight": Blocks((15, 1), torch.tensor([[0, 4], [0, 5], [0, 19]])),
        },
    )


def test_a_plan_is_trained_and_saved_with_the_adapter(tmp_path: Path) -> None:
    model = base()
    plan = plan_of(model)
    wrapped = get_peft_model(model, SmtConfig(selection=plan))
    assert {f"{name}.weight": region for name, region in regions(wrapped).items()} == dict(plan)
    assert wrapped.get_nb_trainable_parameters()[0] == plan.trainable_parameters
    train(wrapped)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert regions(loaded) == regions(wrapped)
    torch.testing.assert_close(loaded(X), wrapped(X), rtol=0, atol=0)
    assert loaded.peft_config["default"].selection["lin0"] == {"of": [20, 10], "block": [3, 5], "blocks": "0,5,13"}


def test_targets_beside_a_plan_are_drawn() -> None:
    model = base()
    wider = SmtConfig(selection=plan_of(model), target_modules=["lin0", "lin1"])
    found = regions(get_peft_model(model, wider))
    assert list(found) == ["lin0", "lin1"]
    assert found["lin0"] == plan_of(Small())["lin0.weight"]


def test_values_are_not_loaded_into_other_blocks(tmp_path: Path) -> None:
    tuned("list").save_pretrained(tmp_path)
    other = tuned("list", seed=1)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(ThriftyError, match="lin0: the file's values are of other blocks"):
        other.load_adapter(tmp_path, "default")
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


def refused(options: dict[str, Any], model: nn.Module | None = None) -> str:
    with pytest.raises(ThriftyError) as caught:
        get_peft_model(model or base(), SmtConfig(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


RECORD = {"of": [20, 10], "block": [4, 4], "blocks": "0-2,7"}
DAMAGED: dict[str, Any] = {
    "none": None,
    "of another model": RECORD | {"of": [20, 11]},
    "no block": RECORD | {"blocks": ""},
    "words": RECORD | {"blocks": "all"},
    "outside": RECORD | {"blocks": "0-99999999999"},
    "backwards": RECORD | {"blocks": "3-2"},
    "twice": RECORD | {"blocks": "0-2,1"},
    "long": RECORD | {"blocks": "9" * 9999},
    "zero": RECORD | {"block": [0, 4]},
    "float": RECORD | {"block": [4.0, 4]},
    "flag": RECORD | {"block": [True, 4]},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_selection_names_the_module(damage: str) -> None:
    assert "selection of lin0" in refused({"selection": {"lin0": DAMAGED[damage]}})


def test_mistakes_name_the_option_and_the_fix() -> None:
    model = base()
    assert "budget 0 is neither" in refused({"budget": 0})
    assert "block_size 'big' is not valid" in refused({"block_size": "big"})
    assert "block_size -1 is not valid" in refused({"block_pattern": {"lin0": -1}})
    assert "did you mean 'lin0'" in refused({"block_pattern": {"lin00": 4}})
    assert "no module lin9 (nearest: lin" in refused({"selection": {"lin9": RECORD}})
    assert "selection must be a Plan" in refused({"selection": [1]})
    whole = Plan.of(model, {"lin1.weight": Whole()})
    assert "lin1.weight of shape (2, 20) is trained as whole" in refused({"selection": whole})
    assert "mid.0.emb is a Embedding" in refused({"target_modules": ["emb"]}, _Embedded())
    attention = nn.ModuleDict({"m": nn.MultiheadAttention(8, 2)})
    assert "NonDynamicallyQuantizableLinear" in refused({"target_modules": ["out_proj"]}, attention)
    with pytest.raises(ThriftyError, match="adapter_names: SMT cannot mix"):
        tuned()(X, adapter_names=["default"] * len(X))


class _Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.ModuleList([nn.ModuleDict({"emb": nn.Embedding(5, 4)})])


def test_targets_that_match_nothing_get_peft_s_own_error() -> None:
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(base(), SmtConfig(target_modules=["nowhere"]))
