"""Optimizers with states of 8 or 4 bits: trained values reach the weights, a resumed run ends bit for bit the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batches, build, config
from safetensors.torch import load_file
from tiny_run import configuration, prepare
from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer import Trainer

from thrifty import attach, train
from thrifty.core.budget import Budget
from thrifty.core.errors import ThriftyError
from thrifty.core.method import parse_method
from thrifty.predict.cost import state_bytes
from thrifty.predict.job import Job
from thrifty.run import arguments
from thrifty.run.checkpoint import checkpoints
from thrifty.run.config import load_config
from thrifty.run.state import load_state, save_state
from thrifty.run.trainer import ThriftyTrainer

# each stack of experts holds 64 blocks of 8 x 8: 4,096 numbers, the fewest whose states both libraries make small
METHOD = {"random_blocks": {"block_size": 8, "target_modules": ["down_proj"], "scope": "per_matrix"}}
NUMBERS = 4096
_TORCHAO, _BITSANDBYTES = (
    pytest.mark.skipif(find_spec(name) is None, reason=f"needs {name}") for name in ("torchao", "bitsandbytes")
)
OPTIMIZERS = [
    *(pytest.param(name, marks=_TORCHAO) for name in ("adamw_torch_8bit", "adamw_torch_4bit")),
    *(pytest.param(name, marks=_BITSANDBYTES) for name in ("adamw_8bit", "paged_adamw_8bit", "lion_8bit")),
]


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """torchao compiles its step for each shape: half a minute each."""
    with torch.compiler.set_stance("force_eager"):
        yield


def made(name: str, parameters: list[torch.nn.Parameter], folder: Path) -> torch.optim.Optimizer:
    """As transformers makes it."""
    kind, options = Trainer.get_optimizer_cls_and_kwargs(
        TrainingArguments(optim=name, output_dir=str(folder), learning_rate=1e-2, weight_decay=0.1, use_cpu=True)
    )
    return kind(parameters, **options)


def tensors(value: Any) -> Iterator[Tensor]:
    """All that a state holds, tensors of few bits by their parts."""
    for item in value.values():
        if hasattr(item, "__tensor_flatten__"):
            yield from (getattr(item, name) for name in item.__tensor_flatten__()[0])
        elif isinstance(item, Tensor):
            yield item


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_hold_base_and_offset_after_each_step(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build("mixtral", dtype, layers=1)
    weight = model.model.layers[0].mlp.experts._parameters["down_proj"]
    assert weight is not None
    base = weight.detach().clone()
    tuning = attach(model, METHOD, budget=NUMBERS, seed=0)
    ((key, region),) = tuning.plan.items()
    (leaf,) = tuning.parameters()
    optimizer = made(name, [leaf], tmp_path)
    before = base
    for batch in batches(3, 4, 12):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected = base.clone()  # read without the forward that writes where a step went unseen
        region.scatter_(expected, (region.gather(base).float().view_as(leaf) + leaf.detach()).to(dtype))
        assert torch.equal(weight, expected)
        assert not torch.equal(weight, before)
        before = weight.detach().clone()
    assert leaf.numel() == NUMBERS, key
    held = sum(t.nbytes for t in tensors(optimizer.state[leaf]) if t.ndim)
    job = Job(config=config("mixtral"), method=parse_method(METHOD), optimizer=name)
    tables = 2 * 256 * 4  # of codes, which bitsandbytes shares between leaves
    assert 0 <= held - state_bytes(job, leaf.nbytes) <= tables
    assert held < state_bytes(dataclasses.replace(job, optimizer="adamw_torch"), leaf.nbytes) / 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_ends_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, family="mixtral")
    changes = {"method": METHOD, "budget": 2 * NUMBERS, "optim": name, "max_steps": 6, "save_steps": 2, "eval": {}}
    train(configuration(tmp_path, **changes, output_dir=str(tmp_path / "whole")))
    real = ThriftyTrainer.training_step

    def stops(self: ThriftyTrainer, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ThriftyTrainer, "training_step", stops)
        with pytest.raises(KeyboardInterrupt):
            train(configuration(tmp_path, **changes))
    assert checkpoints(tmp_path / "out")[-1].step == 4
    train(configuration(tmp_path, **changes, resume_from_checkpoint="auto"))
    last, other = (checkpoints(tmp_path / folder)[-1].folder for folder in ("whole", "out"))
    for file in ("values", "optimizer"):
        expected, found = (load_file(folder / f"{file}.safetensors") for folder in (last, other))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert any(t.dtype == torch.uint8 for t in load_file(last / "optimizer.safetensors").values())


@_TORCHAO
@pytest.mark.parametrize("bits", [8, 4])
def test_states_of_few_bits_are_kept_without_pickle(bits: int, tmp_path: Path) -> None:
    from torchao.optim import subclass_4bit, subclass_8bit

    kind = {8: subclass_8bit.OptimState8bit, 4: subclass_4bit.OptimState4bit}[bits]
    state = kind.zeros((16, 256), signed=True, block_size=128, dtype=torch.float32)
    state.copy_(torch.randn(16, 256, generator=torch.Generator().manual_seed(0)))
    save_state(tmp_path / "state", {"exp_avg": state})
    found = load_state(tmp_path / "state")["exp_avg"]
    assert type(found) is kind
    assert (found.shape, found.dtype) == (state.shape, state.dtype)
    assert torch.equal(found.dequantize(), state.dequantize())


@pytest.mark.parametrize(
    ("name", "package"),
    [("adamw_torch_4bit", "torchao"), ("paged_adamw_32bit", "bitsandbytes"), ("rmsprop_bnb_8bit", "bitsandbytes")],
)
def test_a_missing_package_is_named_before_anything_runs(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "find_spec", lambda _: None)
    config = load_config({"model": "smollm2-135m", "data": {"train": "rows.jsonl"}, "optim": name})
    with pytest.raises(ThriftyError, match=rf"optim: {name} is {package}'s, .*pip install {package}"):
        arguments.training_arguments(config)


@pytest.mark.parametrize(
    ("name", "numbers", "size"),
    [
        ("adamw_torch", 4096, 8 * 4096),
        ("adamw_8bit", 4095, 8 * 4095),  # too small for few bits
        ("adamw_8bit", 4096, 2 * 4096 + 8 * 16),
        ("adamw_torch_4bit", 8192, 8192 + 8 * 32),
        ("lion_8bit", 4096, 4096 + 4 * 16),
        ("rmsprop_bnb_8bit", 4096, 4096 + 4 * 16),
        ("paged_ademamix_8bit", 4096, 3 * (4096 + 4 * 16)),
    ],
)
def test_bytes_of_states(name: str, numbers: int, size: int) -> None:
    job = Job(config=None, method=parse_method(METHOD), budget=Budget(count=2), optimizer=name)
    assert state_bytes(job, 4 * numbers) == size
