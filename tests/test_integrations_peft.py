"""The SMT tuner in PEFT on small modules: what PEFT asks of a method on custom models."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from smt_small import CASES, X, base, layers, train, tuned
from torch import Tensor, nn

from thrifty.core.errors import ThriftyError
from thrifty.integrations.peft import SmtConfig, register

every_case = pytest.mark.parametrize("case", CASES)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "smt_" not in name}


@every_case
def test_only_the_adapter_trains_and_starts_as_the_base(case: str) -> None:
    model = tuned(case, init_weights=True)
    torch.testing.assert_close(model(X), base()(X), rtol=0, atol=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    for name, p in model.named_parameters():
        trained = "smt_offsets" in name or "modules_to_save" in name
        assert p.requires_grad == trained
        assert (p.grad is not None) == trained
        assert torch.equal(p.detach(), before[name]) != trained
    for layer in layers(model):
        assert {p.dtype for p in layer.smt_offsets.values()} == {torch.float32}
        assert (layer.in_features, layer.out_features) == layer.target.out_in[::-1]


@every_case
def test_gradients_are_those_of_the_changed_weight(case: str) -> None:
    model, plain = tuned(case), tuned(case).merge_and_unload().requires_grad_()
    model(X).sum().backward()
    plain(X).sum().backward()
    for layer in layers(model):
        region, leaf = layer.smt_regions["default"], layer.smt_offsets["default"]
        expected = region.gather(plain.get_submodule(layer.target.name).weight.grad)
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-6)


@every_case
def test_saved_and_loaded(case: str, tmp_path: Path) -> None:
    model = tuned(case).eval()
    train(model)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text(encoding="utf-8")
    assert json.loads(text)["peft_type"] == "SMT"
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors", ".md"}
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(loaded(X), model(X), rtol=0, atol=0)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.load_adapter(tmp_path, adapter_name="other", is_trainable=True).missing_keys == []
    loaded.set_adapter("other")
    torch.testing.assert_close(loaded(X), model(X), rtol=0, atol=0)
    light = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(light(X), model(X), rtol=0, atol=0)
    state = {key.removeprefix("base_model.model."): t for key, t in get_peft_model_state_dict(model).items()}
    injected = inject_adapter_in_model(light.peft_config["default"], base(), state_dict=None)
    set_peft_model_state_dict(injected, state)
    torch.testing.assert_close(injected(X), model(X), rtol=0, atol=0)


@every_case
@pytest.mark.parametrize("safe", [False, True])
def test_merged_and_unmerged(case: str, safe: bool) -> None:
    model = tuned(case).eval()
    before, y = weights(model), model(X)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(X), base()(X), rtol=0, atol=0)
    model.merge_adapter(safe_merge=safe)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())
    torch.testing.assert_close(model(X), y, rtol=0, atol=0)
    with pytest.warns(UserWarning, match="nothing changes"):
        model.unmerge_adapter()
    plain = model.merge_and_unload(safe_merge=safe)
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())
    torch.testing.assert_close(pickle.loads(pickle.dumps(plain))(X), y, rtol=1e-4, atol=1e-5)  # noqa: S301


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_safe_merge_refuses_what_is_not_finite_and_changes_nothing(bad: float) -> None:
    model = tuned("one")
    layer = layers(model)[0]
    layer.smt_offsets["default"].data.view(-1)[0] = bad
    before = weights(model)
    with pytest.raises(ValueError, match="adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert layer.merged_adapters == []
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())


@every_case
def test_disabled_is_the_base(case: str) -> None:
    model = tuned(case, init_weights=True)
    train(model)
    y = model(X)
    with model.disable_adapter():
        torch.testing.assert_close(model(X), base()(X), rtol=0, atol=0)
    torch.testing.assert_close(model(X), y, rtol=0, atol=0)
    assert not torch.allclose(y, base()(X))
    if case != "modules_to_save":  # those stay trained
        torch.testing.assert_close(model.unload()(X), base()(X), rtol=0, atol=0)


def test_several_adapters() -> None:
    model = tuned("every", seed=1).eval()
    model.add_adapter("other", SmtConfig(target_modules=["lin0", "mid.1"], init_weights=False, budget=90, block_size=5))
    assert model.active_adapters == ["default"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".other"))
    one = model(X)
    model.set_adapter("other")
    two = model(X)
    model.base_model.set_adapter(["default", "other"])
    both, before = model(X), weights(model)
    assert not any(torch.allclose(a, b) for a, b in ((one, two), (one, both), (two, both)))
    model.merge_adapter(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(adapter_names=["default", "other"])
    torch.testing.assert_close(model(X), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())
    only = copy.deepcopy(model).merge_and_unload(adapter_names=["other"])
    torch.testing.assert_close(only(X), two, rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert not any(".other" in name for name, _ in model.named_parameters())
    assert not any(".other" in name for name in model.state_dict())
    torch.testing.assert_close(model(X), one, rtol=0, atol=0)


def test_adapters_named_alike_are_saved_apart(tmp_path: Path) -> None:
    model = tuned()
    expected = len(get_peft_model_state_dict(model))
    for name in ("default2", "other_default", "foodefault_bar", "efaul"):
        model.add_adapter(name, SmtConfig(**CASES["every"]))
    assert len(get_peft_model_state_dict(model)) == expected
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "efaul", adapter_name="test-adapter")
    torch.testing.assert_close(loaded(X), base()(X), rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bases_of_other_dtypes(dtype: torch.dtype, autocast: bool, tmp_path: Path) -> None:
    x, config = X.to(dtype), SmtConfig(init_weights=False, budget="30%", block_size=4)
    model = get_peft_model(base(dtype), config, autocast_adapter_dtype=autocast)
    expected = torch.float32 if autocast else dtype
    assert {leaf.dtype for layer in layers(model) for leaf in layer.smt_offsets.values()} == {expected}
    y = model(x)
    assert y.dtype == dtype
    y.sum().backward()
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=0.1, atol=0.1)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), y, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    for light in (False, True):
        loaded = PeftModel.from_pretrained(
            base(dtype), tmp_path, autocast_adapter_dtype=autocast, low_cpu_mem_usage=light
        )
        assert {leaf.dtype for layer in layers(loaded) for leaf in layer.smt_offsets.values()} == {expected}
        torch.testing.assert_close(loaded(x), y, rtol=0, atol=0)


def test_a_float32_base_under_autocast() -> None:
    model = tuned()
    y = model(X)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(X)
        half.float().square().sum().backward()
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=0.1, atol=0.2)
    assert {layer.smt_offsets["default"].grad.dtype for layer in layers(model)} == {torch.float32}


def test_float32_leaves_stay_so_where_a_trainer_or_a_model_wide_cast_would_round_them() -> None:
    model = tuned()
    before = [layer.smt_offsets["default"].detach().clone() for layer in layers(model)]
    for _, p in model.named_parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.bfloat16)  # as TRL's trainers do under a quantized base
    model.to(torch.bfloat16)
    now = [layer.smt_offsets["default"] for layer in layers(model)]
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, now, strict=True))
    now[0].data = torch.ones_like(before[0], dtype=torch.bfloat16)  # other values are taken
    assert torch.equal(now[0].detach(), torch.ones_like(before[0]))
    assert model(X.bfloat16()).dtype == torch.bfloat16


def test_a_deep_copy_and_a_pickle_train_on_their_own() -> None:
    model = tuned()
    y = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        torch.testing.assert_close(twin(X), y, rtol=0, atol=0)
        train(twin)
        assert not torch.allclose(twin(X), y)
        torch.testing.assert_close(model(X), y, rtol=0, atol=0)


def test_compiled_is_the_same() -> None:
    model = tuned()
    model(X).sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compile(model.base_model, backend="aot_eager", fullgraph=True)(X).sum().backward()
    assert plain
    for name, grad in plain.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, rtol=1e-4, atol=1e-5)


def test_status_names_and_counts() -> None:
    model = tuned()
    status = model.get_model_status()
    assert status.peft_types == {"default": "SMT"}
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.requires_grad == {"default": True}
    assert status.num_adapter_layers == len(layers(model)) == 4
    first = model.get_layer_status()[0]
    assert (first.name, first.module_type) == ("model.lin0", "smt.SmtLinear")
    trained, total = model.get_nb_trainable_parameters()
    of_base = sum(p.numel() for p in base().parameters())
    assert 0.8 * 0.3 * of_base <= trained <= 0.3 * of_base
    assert total == of_base + trained
    assert model.base_model.supports_lora_conversion()


def test_the_offsets_as_lora() -> None:
    model = tuned("conv1d")
    config, state = convert_to_lora(model, rank=15)
    lora = get_peft_model(base(), config)
    set_peft_model_state_dict(lora, state)
    assert isinstance(config, LoraConfig)
    torch.testing.assert_close(lora(X), model(X), rtol=1e-4, atol=1e-5)


def test_registering_again_changes_nothing_and_another_smt_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs

    register()
    assert configs["SMT"] is SmtConfig
    monkeypatch.setitem(configs, "SMT", LoraConfig)
    with pytest.raises(ThriftyError, match="has a method SMT already"):
        register()
    assert configs["SMT"] is LoraConfig


def test_without_peft_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "thrifty.integrations.peft")
    with pytest.raises(ThriftyError, match="pip install 'thrifty\\[peft\\]'"):
        importlib.import_module("thrifty.integrations.peft")
