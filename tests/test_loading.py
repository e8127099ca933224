"""Loading a checkpoint takes little more memory than the model, in whatever dtype it is held."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from safetensors.torch import save_file
from tiny_run import start
from transformers import LlamaConfig, LlamaForCausalLM, modeling_utils

from thrifty.core.heap import trim_heap
from thrifty.run.loading import streaming
from thrifty.run.model import load_model

# Llama-3.2-1B's shape, and one with 94 million numbers whose largest matrix is as small a part of it
BILLION = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
SMALLER = BILLION | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8, "vocab_size": 32000}
SMALLER["num_attention_heads"] = 12
SMALLER["num_key_value_heads"] = 4
MOST = 1.2  # of the model in the dtype that it is held in


def write_checkpoint(folder: Path, shape: dict[str, Any], dtype: torch.dtype, *, shard_bytes: float) -> Path:
    """Random values in the layout that `save_pretrained` writes, one shard in memory at a time."""
    config = LlamaConfig(**shape, dtype=dtype, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in shapes.items():
        if room < size.numel() * dtype.itemsize and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size.numel() * dtype.itemsize
    generator, where = torch.Generator().manual_seed(0), {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        made = {name: torch.empty(shapes[name], dtype=dtype).normal_(0, 0.02, generator=generator) for name in names}
        save_file(made, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def resident() -> dict[str, int]:
    """Bytes: now, the highest since the last reset, and what no file backs."""
    status = Path("/proc/self/status").read_text()
    found = {key: re.search(rf"{key}:\s+(\d+) kB", status) for key in ("VmRSS", "VmHWM", "RssAnon")}
    return {key: 1024 * int(match[1]) for key, match in found.items() if match}


def measured(folder: Path, dtype: str, answer: Path) -> None:
    """Load in this process; write how much memory it took at most, as shares of the model."""
    torch.set_num_threads(1)
    load_model(folder, dtype=dtype)  # what comes with the first model of all: modules, buffers of libraries
    trim_heap()
    Path("/proc/self/clear_refs").write_text("5")
    before, anonymous, done = resident(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            anonymous.append(resident()["RssAnon"])

    thread = threading.Thread(target=sample)
    thread.start()
    model = load_model(folder, dtype=dtype)
    for parameter in model.parameters():
        parameter.detach().reshape(-1)[::512].sum()  # a page of a mapped file is resident once it is read
    done.set()
    thread.join()
    after, size = resident(), sum(p.nbytes for p in model.parameters())
    found = {"peak": after["VmHWM"] - before["VmRSS"], "anonymous": max(anonymous) - before["RssAnon"]}
    held = {str(p.dtype) for p in model.parameters()}
    answer.write_text(json.dumps({key: value / size for key, value in found.items()} | {"held": sorted(held)}))


def peak_of_loading(folder: Path, dtype: str, answer: Path) -> dict[str, Any]:
    child = start(measured, folder, dtype, answer)
    child.join()
    assert child.exitcode == 0
    found: dict[str, Any] = json.loads(answer.read_text())
    assert found.pop("held") == [f"torch.{dtype}"]
    print(f"{folder.name} -> {dtype}: {found}")
    return found


needs_clear_refs = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux's own figures")


@needs_clear_refs
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")],
)
def test_loading_takes_little_more_than_the_model(stored: str, dtype: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / stored, SMALLER, getattr(torch, stored), shard_bytes=6e7)
    assert len(list(folder.glob("*.safetensors"))) > 2
    found = peak_of_loading(folder, dtype, tmp_path / "answer.json")
    assert found["peak"] < MOST
    assert found["anonymous"] < (0.1 if stored == dtype else MOST)  # mapped pages cost none


@needs_clear_refs
@pytest.mark.large
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_billion_numbers(dtype: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "billion", BILLION, torch.bfloat16, shard_bytes=6e8)
    found = peak_of_loading(folder, dtype, tmp_path / "answer.json")
    assert found["peak"] < MOST


@pytest.mark.parametrize("family", ["gemma2", "mixtral"])  # tied weights; experts joined from one tensor each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_model_as_without(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    build(family, torch.bfloat16, layers=2).save_pretrained(tmp_path, max_shard_size="20KB")
    kind = type(build(family, layers=2))
    plain, ours = kind.from_pretrained(tmp_path, dtype=dtype), load_model(tmp_path, dtype=dtype)
    for (name, a), (other, b) in zip(state(plain), state(ours), strict=True):
        assert name == other
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name
    assert len(dict(plain.named_parameters())) == len(dict(ours.named_parameters()))


def state(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.state_dict().items()
    yield from model.named_buffers()


def test_transformers_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = modeling_utils.safe_open
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "0")
    with streaming(torch.float32):
        assert modeling_utils.safe_open is not opened
        assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "1"
    assert modeling_utils.safe_open is opened
    assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "0"
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD")
    with streaming("auto"):
        pass
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ
