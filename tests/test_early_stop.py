"""Nothing is differentiated below the lowest trained layer, whoever switches activation checkpointing on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import batches, build
from tiny_tokenizer import character_tokenizer
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from thrifty.update.tuning import Tuning, attach

(BATCH,) = batches(1, 3, 11)
METHOD = {"random_blocks": {"block_size": 8, "target_modules": r".*layers\.[23]\..*"}}
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "max_steps": 2,
    "save_strategy": "no",
    "gradient_checkpointing": True,
}


def attached(model: nn.Module) -> Tuning:
    tuning = attach(model, METHOD, budget=0.05)
    assert {name.split(".")[2] for name in tuning.plan} == {"2", "3"}
    return tuning


def watched(model: nn.Module) -> set[int]:
    """Fills with the layers through whose inside a gradient goes."""
    entered: set[int] = set()
    for i, layer in enumerate(model.model.layers):

        def watch(module: nn.Module, args: Any, out: Tensor, i: int = i) -> None:
            if out.requires_grad:
                out.register_hook(lambda _: entered.add(i))

        layer.mlp.register_forward_hook(watch)
    return entered


def loop(model: nn.Module, folder: Path) -> None:
    model(**BATCH).loss.backward()


def checkpointed_loop(model: nn.Module, folder: Path) -> None:
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    loop(model, folder)


def transformers_trainer(model: nn.Module, folder: Path) -> None:
    rows = [{key: values[i] for key, values in BATCH.items()} for i in range(3)]
    args = TrainingArguments(str(folder), per_device_train_batch_size=1, **QUIET)
    Trainer(model, args, train_dataset=rows).train()  # type: ignore[arg-type]
    assert model.is_gradient_checkpointing


def trl_trainer(model: nn.Module, folder: Path) -> None:
    data = Dataset.from_list([{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(4)])
    args = SFTConfig(str(folder), bf16=False, max_length=16, **QUIET)
    SFTTrainer(model, args, train_dataset=data, processing_class=character_tokenizer()).train()
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("train", [loop, checkpointed_loop, transformers_trainer, trl_trainer])
def test_backward_enters_no_layer_below(train: Callable[[nn.Module, Path], None], tmp_path: Path) -> None:
    model = build("llama", layers=4)
    tuning = attached(model)
    entered = watched(model)
    train(model, tmp_path)
    assert entered == {2, 3}
    assert train in (loop, checkpointed_loop) or all(leaf.any() for leaf in tuning.parameters())


def test_checkpointing_may_be_on_before_the_model_is_attached() -> None:
    model = build("llama", layers=4)
    model.activation_checkpointing_enable()
    tuning = attached(model)
    entered = watched(model)
    loop(model, Path())
    assert entered == {2, 3}
    assert all(leaf.grad.any() for leaf in tuning.parameters())


def test_the_reentrant_kind_still_gets_what_it_needs() -> None:
    model = build("llama", layers=4)
    tuning = attached(model)
    loop(model, Path())
    expected = [leaf.grad.clone() for leaf in tuning.parameters()]
    for leaf in tuning.parameters():
        leaf.grad = None
    model.activation_checkpointing_enable({"use_reentrant": True})
    loop(model, Path())
    for leaf, grad in zip(tuning.parameters(), expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.parametrize("before", [False, True])
def test_finish_leaves_the_model_as_it_was(before: bool) -> None:
    def asks_for_input_gradients() -> bool:
        (seen,) = model.get_input_embeddings()(BATCH["input_ids"][None, 0, :1])
        return seen.requires_grad

    model = build("llama", layers=4).requires_grad_(False)
    if before:
        model.enable_input_require_grads()
    methods = set(vars(model))
    tuning = attached(model)
    model.enable_input_require_grads()
    assert not asks_for_input_gradients()
    tuning.finish()
    assert asks_for_input_gradients() is before
    assert set(vars(model)) == methods
    model.enable_input_require_grads()
    assert asks_for_input_gradients()
