"""What the probe looks at: rows of the training data, or, for methods that ask for it, windows of a general text; and
in which precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from thrifty.core.errors import ThriftyError
from thrifty.core.method import parse_method
from thrifty.data import windows
from thrifty.objective.next_token import loss_of
from thrifty.select.probe import Loss

from .config import RunConfig
from .order import row_order

__all__ = ["WINDOW", "check_text", "general_rows", "probe_batches", "probe_loss"]

WINDOW = 128  # tokens of general text in one row, at most


def check_text(config: RunConfig) -> None:
    """ThriftyError where the method needs general text and the run gives none, or what measures its forgetting."""
    method = parse_method(config.method)
    if not method.general:
        return
    if method.text is None:
        raise ThriftyError(
            f"method {method.name!r} takes its statistics from general text: "
            f"give a plain text file, method: {{{method.name}: {{text: general.txt}}}}"
        )
    if not Path(method.text).expanduser().is_file():
        raise ThriftyError(f"method.{method.name}.text: there is no file {method.text!r}: name a plain text file")
    forgetting = config.eval.forgetting
    if forgetting is not None and Path(forgetting).resolve() == Path(method.text).expanduser().resolve():
        raise ThriftyError(
            f"method.{method.name}.text is also eval.forgetting: what was looked at before training would no longer "
            "measure forgetting; give two files"
        )


def general_rows(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]] | None:
    """Windows of the method's general text, every token a label; None where it looks at the task."""
    method = parse_method(config.method)
    if not method.general:
        return None
    assert method.text is not None, "check_text comes first"
    found = windows(method.text, tokenizer, length=min(WINDOW, config.max_length))
    return [{"input_ids": ids, "labels": list(ids)} for ids in found]


def probe_batches(
    config: RunConfig,
    rows: Sequence[Mapping[str, Any]],
    *,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    seed: int,
) -> Iterator[Mapping[str, Any]]:
    """`probe_units` units of `probe_rows` of the rows, drawn by the seed."""
    order = row_order(len(rows), seed=seed, epoch=0)[: config.probe_units * config.probe_rows]
    for start in range(0, len(order), config.probe_rows):
        yield collate([rows[i] for i in order[start : start + config.probe_rows]])


def probe_loss(args: TrainingArguments) -> Loss:
    """`loss_of`, in the precision of training, so that looking again at the same weights gives the same plan.

    With `bf16` the forward runs under autocast; backward is the caller's, outside of it. With `fp16` it stays in the
    model's own dtype: without the Trainer's loss scale, gradients would underflow.
    """

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        with _own_forward(model), torch.autocast(args.device.type, dtype=torch.bfloat16, enabled=bool(args.bf16)):
            return loss_of(model, batch)

    return loss if args.bf16 or args.fp16 else loss_of


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """While open, the forward is without the autocast that accelerate puts around it once it has the model."""
    own = vars(model)
    if "_original_forward" not in own:
        yield
        return
    prepared = own["forward"]
    own["forward"] = own["_original_forward"]
    try:
        yield
    finally:
        own["forward"] = prepared
