"""A model as evaluation needs it, and as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from thrifty.data import check_vocabulary
from thrifty.objective import label_only
from thrifty.objective.heads import unwrapped

__all__ = ["check_ids", "evaluating"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside: no dropout, no gradients, label-only losses, and no router loss. Each module's mode is put back after."""
    modes = {module: module.training for module in model.modules()}
    config: Any = getattr(model, "config", None)
    with ExitStack() as stack:
        stack.callback(_restore, modes)
        model.eval()
        if getattr(config, "output_router_logits", False):
            # The router loss is no part of the next-token loss, and depends on what else is in the batch.
            config.output_router_logits = False
            stack.callback(setattr, config, "output_router_logits", True)
        # Not inference_mode: a buffer that a model makes in it could not take part in training afterwards.
        stack.enter_context(torch.no_grad())
        stack.enter_context(label_only(model))
        yield


def _restore(modes: dict[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


def check_ids(model: nn.Module, rows: Sequence[dict[str, list[int]]]) -> None:
    """ThriftyError where the `input_ids` of a row are not in the model's vocabulary."""
    check_vocabulary(rows, int(unwrapped(model).get_input_embeddings().weight.shape[0]))
