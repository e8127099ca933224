"""Merged checkpoints: transformers loads the trained model bit for bit, and memory stays near one tensor."""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_run import save_checkpoint
from torch import nn
from transformers import AutoModelForCausalLM

from thrifty import attach
from thrifty.core.errors import ThriftyError
from thrifty.core.region import Blocks
from thrifty.delta import Delta, NewTokens, Piece
from thrifty.delta.diff import diff
from thrifty.run.export import export
from thrifty.run.memory import MemoryMeter
from thrifty.run.merged import Checkpoint, merge_checkpoint, unmerge_checkpoint
from thrifty.run.model import load_model

METHODS = {
    "blocks": {"random_blocks": {"block_size": 8}},
    "pairs": [{"select": {"weights": {"target_modules": ".*(up_proj|c_fc)"}}, "update": {"low_rank": {"r": 2}}}],
    "full": "full",
}


def trained(model: nn.Module, method: Any = METHODS["blocks"]) -> Delta:
    """A delta; `model` becomes the trained one."""
    tuning = attach(model, method, budget=0.05 if isinstance(method, dict) else None)
    generator = torch.Generator().manual_seed(1)
    for leaf in tuning.parameters():
        leaf.data.add_(0.1 * torch.randn(leaf.shape, generator=generator))
    tuning.sync()
    delta = tuning.delta()
    tuning.finish()
    return delta


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: p.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, p in model.named_parameters()}


def sharded(folder: Path, family: str = "llama") -> Path:
    """A tiny checkpoint in several shards, with its tokenizer."""
    save_checkpoint(folder, family=family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_the_trained_model(family: str, method: str, dtype: str, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", family=family)
    model = load_model(base, dtype=dtype)
    before = bits(model)
    delta = trained(model, METHODS[method])
    delta.save(tmp_path / "delta")
    merged = merge_checkpoint(Delta.load(tmp_path / "delta"), base, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(merged)
    assert loaded.dtype == getattr(torch, dtype)
    assert bits(loaded) == bits(model) != before
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype
    unmerge_checkpoint(delta, merged, tmp_path / "back")
    assert bits(AutoModelForCausalLM.from_pretrained(tmp_path / "back")) == before


def test_shards_keep_their_names_and_small_files_come_along(tmp_path: Path) -> None:
    base = sharded(tmp_path / "base")
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    (base / "notes.txt").write_text("kept")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    model = load_model(base)
    delta = trained(model)
    output = merge_checkpoint(delta, base, str(tmp_path / "merged"), dtype="bfloat16")
    assert output == str(tmp_path / "merged")
    kept = sorted(path.name for path in base.iterdir() if path.name != "pytorch_model.bin")
    assert sorted(path.name for path in Path(output).iterdir()) == kept
    assert (Path(output) / "additional_chat_templates" / "tools.jinja").read_text() == "{{ messages }}"
    before, after = (
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (base, Path(output))
    )
    assert after["weight_map"] == before["weight_map"]
    assert 2 * after["metadata"]["total_size"] == before["metadata"]["total_size"]
    for shard in set(before["weight_map"].values()):
        with safe_open(Path(output) / shard, "pt") as file:
            assert file.metadata()["format"] == "pt"
    assert bits(AutoModelForCausalLM.from_pretrained(output)) == bits(model.to(torch.bfloat16))


def test_a_merge_equals_an_export(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    trained(load_model(base)).save(tmp_path / "delta")
    merged = merge_checkpoint(Delta.load(tmp_path / "delta"), base, tmp_path / "merged", dtype="bfloat16")
    exported = export(str(tmp_path / "delta"), output=str(tmp_path / "exported"), base=str(base), dtype="bfloat16")
    one, other = (load_file(Path(folder) / "model.safetensors") for folder in (merged, exported))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_unchanged_tensors_of_another_type_stay_as_they_are(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors = {name: t if "input_layernorm" in name else t.bfloat16() for name, t in tensors.items()}
    tensors["steps"] = torch.arange(3)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    model = load_model(base, dtype="bfloat16")
    merged = load_file(Path(merge_checkpoint(trained(model), base, tmp_path / "merged")) / "model.safetensors")
    assert {name: t.dtype for name, t in merged.items()} == {name: t.dtype for name, t in tensors.items()}
    assert all(torch.equal(merged[name], tensors[name]) for name in merged if "layernorm" in name or name == "steps")


def refused(call: Any, output: Path, message: str) -> None:
    with pytest.raises(ThriftyError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
    assert not output.exists()
    assert not list(output.parent.glob(".partial*"))


def test_another_checkpoint_is_refused_by_its_first_tensor(tmp_path: Path) -> None:
    base, output = save_checkpoint(tmp_path / "base"), tmp_path / "out"
    delta = trained(load_model(base))
    merged = merge_checkpoint(delta, base, tmp_path / "merged")
    refused(lambda: merge_checkpoint(delta, merged, output), output, "the delta is merged already")
    refused(
        lambda: unmerge_checkpoint(delta, save_checkpoint(tmp_path / "deep", layers=1), output), output, "no tensor"
    )
    other = tmp_path / "other"
    build("llama", seed=9, layers=2).save_pretrained(other)
    refused(
        lambda: merge_checkpoint(delta, other, output),
        output,
        r"^model.layers\S+ differs from the base of this delta: another base",
    )
    refused(lambda: unmerge_checkpoint(delta, other, output), output, r"^model.layers\S+ is not this delta on its base")
    build("gpt2").save_pretrained(tmp_path / "gpt2")
    refused(
        lambda: merge_checkpoint(delta, tmp_path / "gpt2", output), output, "has no tensor .*: use `thrifty export`"
    )
    refused(lambda: merge_checkpoint(delta, base, output, dtype="float23"), output, "did you mean 'float32'")
    refused(lambda: merge_checkpoint(delta, tmp_path / "base" / "nothing", output), output, "no such folder")
    half = merge_checkpoint(delta, base, tmp_path / "half", dtype="bfloat16")
    refused(
        lambda: unmerge_checkpoint(delta, half, output),
        output,
        "one in another dtype, or changed since",
    )
    delta.new_tokens = NewTokens(ids={"<a>": 97}, base_rows=97, rows=98)
    refused(lambda: merge_checkpoint(delta, base, output), output, "adds tokens.*`thrifty export` applies it")
    delta.new_tokens = None
    with pytest.raises(ThriftyError, match="holds the base model itself"):
        merge_checkpoint(delta, base, base)
    with pytest.raises(ThriftyError, match="exists and is not empty"):
        merge_checkpoint(delta, base, merged)


def test_names_that_transformers_changes_are_refused(tmp_path: Path) -> None:
    model, output = build("mixtral", layers=1), tmp_path / "out"
    model.save_pretrained(tmp_path / "base")
    delta = trained(model, {"random_blocks": {"block_size": 8, "target_modules": ["gate_up_proj"]}})
    refused(lambda: merge_checkpoint(delta, tmp_path / "base", output), output, "under other names.*`thrifty export`")


def test_a_tied_tensor_that_lies_in_the_file_twice_is_refused(tmp_path: Path) -> None:
    base, output = save_checkpoint(tmp_path / "base", family="gpt2"), tmp_path / "out"
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    delta = trained(load_model(base), "full")
    refused(lambda: merge_checkpoint(delta, base, output), output, "lm_head.weight is a copy of transformer.wte.weight")


def index(folder: Path, change: Any) -> Path:
    """A copy of the sharded checkpoint with a garbled index."""
    path = folder / "model.safetensors.index.json"
    value = json.loads(path.read_text())
    path.write_text(change(value) or json.dumps(value))
    return folder


DAMAGE = {
    "shard outside": (lambda v: v["weight_map"].update({"lm_head.weight": "../x.safetensors"}), "holds no shard"),
    "shard missing": (lambda v: v["weight_map"].update({"lm_head.weight": "y.safetensors"}), "holds no shard 'y"),
    "tensor missing": (lambda v: v["weight_map"].update({"z": next(iter(v["weight_map"].values()))}), "lacks z"),
    "no map": (lambda v: v.pop("weight_map") and None, "has no weight_map"),
    "a list": (lambda v: "[]", "no mapping"),
    "no JSON": (lambda v: "{", "is damaged"),
    "twice": (lambda v: '{"weight_map": {}, "weight_map": {}}', "comes twice"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_index_is_one_line(kind: str, tmp_path: Path) -> None:
    change, message = DAMAGE[kind]
    folder = index(sharded(tmp_path / "base"), change)
    refused(lambda: Checkpoint(folder), tmp_path / "out", message)


def test_diff_of_two_checkpoints_finds_the_planned_blocks(tmp_path: Path) -> None:
    base = sharded(tmp_path / "base")
    model = load_model(base)
    plan = trained(model, METHODS["blocks"]).plan
    model.save_pretrained(tmp_path / "tuned")
    found = diff(Checkpoint(base), Checkpoint(tmp_path / "tuned"))
    assert set(found.plan) == set(plan)
    for name, region in plan.items():
        shape = plan.shapes[name]
        assert torch.equal(found.plan[name].mask(shape), region.mask(shape))
    found.save(tmp_path / "delta")
    again = load_model(base)
    assert found.total == sum(p.numel() for p in again.parameters())
    assert bits(Delta.load(tmp_path / "delta").apply(again)) == bits(model)
    half = diff(Checkpoint(base, dtype="bfloat16"), Checkpoint(tmp_path / "tuned", dtype=torch.bfloat16))
    expected = copy.deepcopy(model).to(torch.bfloat16)
    assert bits(half.apply(load_model(base, dtype="bfloat16"))) == bits(expected)


def large(folder: Path) -> tuple[int, Path]:
    """170 MiB in 5 tensors of two shards: bytes of one, and the folder."""
    folder.mkdir()
    shape, weight_map = (2048, 4352), {}  # above 32 MiB, so that the C library gives back what is freed
    for shard in ("a.safetensors", "b.safetensors"):
        names = [f"{shard[0]}.{i}.weight" for i in range(3 if shard[0] == "a" else 2)]
        save_file({name: torch.full(shape, 0.5) for name in names}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return 4 * shape[0] * shape[1], folder


def one_block_each(base: Checkpoint) -> Delta:
    """Every tensor with one block of 256 x 256 moved."""
    pieces = {}
    for name, before in base.items():
        after = before.clone()
        after[256:512, 512:768] += 1
        pieces[name] = Piece.of(before, after, Blocks((256, 256), torch.tensor([[1, 2]])))
    return Delta(pieces, method={}, total=1)


def test_memory_stays_near_one_tensor(tmp_path: Path) -> None:
    tensor_bytes, base = large(tmp_path / "base")
    one_block_each(Checkpoint(base)).save(tmp_path / "delta")
    gc.collect()
    meter = MemoryMeter(nn.Linear(1, 1))
    merge_checkpoint(Delta.load(tmp_path / "delta"), base, tmp_path / "merged", dtype="bfloat16")
    peak = meter.peak()
    meter.close()
    assert peak < 2.5 * tensor_bytes  # the tensor and its cast
    block = Checkpoint(tmp_path / "merged")["b.1.weight"][256:513, 512:769]
    assert block.dtype == torch.bfloat16
    assert block[:-1, :-1].eq(1.5).all()
    assert block[-1].eq(0.5).all()
    assert block[:, -1].eq(0.5).all()
