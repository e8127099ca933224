"""Deltas: exact both ways, whole or absent on disk, and refused where they do not belong."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batches, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from thrifty import attach
from thrifty.core import tensor_file
from thrifty.core.errors import ThriftyError
from thrifty.delta import Delta
from thrifty.delta.digest import fingerprint


def small(dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (9, 7), seed: int = 0) -> nn.Module:
    """Two matrices, one bias, and values that arithmetic would not give back."""
    model = nn.ModuleDict({"a": nn.Linear(shape[1], shape[0]), "b": nn.Linear(5, 6, bias=False)})
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        powers = 10.0 ** torch.randint(-4, 4, p.shape, generator=generator)
        p.data = torch.randn(p.shape, generator=generator).mul(powers).to(dtype)
        p.data.view(-1)[:1] = -0.0
    return model


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: p.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, p in model.named_parameters()}


def moved(model: nn.Module, method: Any = None, *, budget: Any = 0.5, seed: int = 0) -> Delta:
    """Attach, move every trained number, and give the delta; the model is finished and trained."""
    tuning = attach(model, method or {"random_blocks": {"block_size": 2}}, budget=budget, seed=seed)
    for leaf in tuning.parameters():
        leaf.data.add_(torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed)))
    tuning.sync()
    delta = tuning.delta()
    tuning.finish()
    return delta


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(
        [{"random_blocks": {"block_size": n}} for n in ([1, 1], [2, 3], [4, 4], "row", "column")] + ["full"]
    ),
    st.integers(0, 99),
)
def test_apply_and_remove_are_exact(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int], dtype: torch.dtype, method: Any, seed: int
) -> None:
    trained, base = small(dtype, shape, seed), small(dtype, shape, seed)
    before = bits(base)
    assert bits(trained) == before
    delta = moved(trained, method, budget=None if method == "full" else 0.6, seed=seed)
    delta.save(folder := tmp_path_factory.mktemp("delta") / "d")
    loaded = Delta.load(folder)
    assert loaded.apply(base) is base
    assert bits(base) == bits(trained) != before
    assert loaded.remove(base) is base
    assert bits(base) == before
    assert dict(loaded.plan) == dict(delta.plan)
    assert (loaded.method, loaded.total) == (delta.method, delta.total)


def test_the_folder_holds_two_files_and_the_whole_method(tmp_path: Path) -> None:
    delta = moved(small(), {"random_blocks": {"block_size": [2, 3]}})
    delta.info["note"] = "kept"
    delta.save(tmp_path / "d")
    assert sorted(file.name for file in (tmp_path / "d").iterdir()) == ["delta.json", "delta.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == ["d"]
    loaded = Delta.load(str(tmp_path / "d"))
    assert loaded.method == {"random_blocks": {"block_size": [2, 3]}}
    assert loaded.info == {"note": "kept"}
    assert {piece.fingerprint for piece in loaded.pieces.values()} == {
        fingerprint(p) for name, p in small().named_parameters() if name in delta.pieces
    }


def test_a_delta_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    one, other = moved(small(), seed=1), moved(small(), seed=2)
    one.save(tmp_path / "d")
    other.save(tmp_path / "d")
    name = next(iter(other.pieces))
    assert torch.equal(Delta.load(tmp_path / "d").pieces[name].values, other.pieces[name].values)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(ThriftyError, match="exists and is no delta: give another folder"):
        one.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"
    (tmp_path / "empty").mkdir()
    one.save(tmp_path / "empty")


def test_a_full_disk_leaves_the_previous_delta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = moved(small(), seed=1), moved(small(), seed=2)
    one.save(tmp_path / "d")

    def full(writer: tensor_file.TensorWriter) -> None:
        writer.path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_file.TensorWriter, "_finish", full)
    with pytest.raises(OSError, match="No space left"):
        other.save(tmp_path / "d")
    assert [file.name for file in tmp_path.iterdir()] == ["d"]
    for name, piece in Delta.load(tmp_path / "d").pieces.items():
        assert torch.equal(piece.values, one.pieces[name].values)


def refused(call: Any, model: nn.Module, message: str) -> None:
    """It raises one line, and not a bit of the model changes."""
    before = bits(model)
    with pytest.raises(ThriftyError, match=message) as error:
        call(model)
    assert "\n" not in str(error.value)
    assert bits(model) == before


def test_another_base_is_refused_by_its_first_differing_tensor() -> None:
    delta, base = moved(small(), budget=0.7), small()
    assert list(delta.pieces) == ["a.weight", "b.weight"]
    outside = (~delta.plan["b.weight"].mask((6, 5))).nonzero()[0].tolist()
    base.b.weight.data[tuple(outside)] += 1
    refused(delta.apply, base, "^b.weight differs from the base of this delta: another base, or a changed one$")
    for mask in (~delta.plan["b.weight"].mask((6, 5)), delta.plan["b.weight"].mask((6, 5))):  # outside, and trained on
        trained = delta.apply(small())
        trained.b.weight.data[tuple(mask.nonzero()[0].tolist())] += 1
        refused(delta.remove, trained, "^b.weight is not this delta on its base: another model, or values that were")
    base.a.weight.data[0, 0] += 1
    refused(delta.apply, base, "^a.weight differs")


def test_a_delta_is_applied_once_and_removed_once() -> None:
    delta, base = moved(small()), small()
    refused(delta.remove, base, "is the base already: the delta is not applied, there is nothing to remove")
    delta.apply(base)
    refused(delta.apply, base, "the delta is applied already")
    delta.remove(base)
    delta.apply(base)


def test_another_dtype_shape_or_model_is_refused() -> None:
    delta = moved(small(torch.bfloat16))
    refused(delta.apply, small(), r"a.weight is torch.float32, .*load the base with dtype=bfloat16")
    refused(delta.apply, small(torch.bfloat16, (9, 8)), r"a.weight is \(9, 8\), the delta is of \(9, 7\)")
    refused(delta.apply, nn.ModuleDict({"c": nn.Linear(7, 9)}), "the model has no tensor a.weight .nearest: c.weight")


def test_an_attached_model_is_refused() -> None:
    delta, base = moved(small()), small()
    tuning = attach(base, "random_blocks", budget=0.5)
    refused(delta.apply, base, "is still attached: call finish")
    refused(delta.remove, base, "is still attached: call finish")
    tuning.finish()
    delta.apply(small())


@pytest.mark.parametrize("method", ["full", {"random_blocks": {"block_size": 2}}], ids=str)
def test_a_model_cast_while_attached_gives_a_delta_of_the_cast_base(method: Any, tmp_path: Path) -> None:
    model = small()
    tuning = attach(model, method, budget=None if method == "full" else 0.5)
    model.to(torch.bfloat16)
    for leaf in tuning.parameters():
        leaf.data.add_(1.0)
    tuning.sync()
    tuning.delta().save(tmp_path / "d")
    trained = bits(tuning.finish())
    assert bits(Delta.load(tmp_path / "d").apply(small().to(torch.bfloat16))) == trained


def peer(**options: Any) -> tuple[Any, Delta]:
    tuning = attach(build("llama", layers=1), {"peft": {"r": 2} | options})
    with torch.no_grad():
        for leaf in tuning.parameters():
            leaf.add_(0.1)
    return tuning, tuning.delta()


def test_a_peer_delta_wraps_the_adapter_folder(tmp_path: Path) -> None:
    from peft import PeftModel

    tuning, delta = peer(target_modules=["q_proj", "down_proj"])
    delta.save(tmp_path / "d")
    (batch,) = batches(1, 2, 8)
    by_peft = PeftModel.from_pretrained(build("llama", layers=1), tmp_path / "d" / "adapter")
    assert torch.equal(by_peft(**batch).logits, tuning.model(**batch).logits)
    base = build("llama", layers=1)
    before = bits(base)
    loaded = Delta.load(tmp_path / "d")
    assert loaded.apply(base) is base
    torch.testing.assert_close(base(**batch).logits, by_peft(**batch).logits)
    assert 0 <= loaded.difference < 1e-4
    loaded.remove(base)
    assert bits(base) == before
    refused(loaded.remove, base, "cannot be removed exactly: load the base again")


def test_a_peer_delta_is_refused_on_another_base() -> None:
    _, delta = peer(target_modules=["q_proj", "down_proj"])
    name = "model.layers.0.mlp.down_proj.weight"
    base = build("llama", layers=1)
    base.get_parameter(name).data[0, 0] += 1
    refused(delta.apply, base, f"^{name} differs from the base of this delta")
    refused(delta.apply, build("gpt2", layers=1), "differs from the base of this delta")


def test_a_peer_delta_on_stacked_experts_knows_their_base() -> None:
    tuning = attach(build("mixtral", layers=1), {"peft": {"r": 2}})
    delta, base = tuning.delta(), build("mixtral", layers=1)
    name = "model.layers.0.mlp.experts.down_proj"
    base.get_parameter(name).data[0, 0, 0] += 1
    refused(delta.apply, base, f"^{name} differs from the base of this delta")


def test_virtual_tokens_cannot_be_merged(tmp_path: Path) -> None:
    tuning = attach(build("llama", layers=1), {"peft": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}})
    tuning.delta().save(tmp_path / "d")
    refused(Delta.load(tmp_path / "d").apply, build("llama", layers=1), "PROMPT_TUNING adds virtual tokens")
