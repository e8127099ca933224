"""Activation checkpointing as a run asks for it: all layers or the lowest few, and never more than must be computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from thrifty.select.recompute import recompute_first

__all__ = ["settle_checkpointing", "switch_on_checkpointing"]


def switch_on_checkpointing(model: PreTrainedModel, args: TrainingArguments, *, layers: int | None) -> None:
    """For the probe, before which no trainer has done so. `layers`: the run's `checkpoint_layers`."""
    if args.activation_checkpointing and model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable()
        if layers is not None:
            recompute_first(model, layers)


def settle_checkpointing(model: Any, args: TrainingArguments, *, record: Mapping[str, Any]) -> None:
    """After the trainer switched it on, which also made the embeddings' output require a gradient: all layers would be
    differentiated."""
    if args.activation_checkpointing:
        model.disable_input_require_grads()
        if (layers := record["config"]["checkpoint_layers"]) is not None:
            recompute_first(model, layers)
