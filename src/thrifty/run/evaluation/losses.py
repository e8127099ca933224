"""Next-token losses of rows, in batches of similar length.

Names: B rows, T tokens, D hidden size, V vocabulary, c labelled tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from thrifty.core.errors import ThriftyError
from thrifty.data import Example, collate, encode_all, windows
from thrifty.kernels.label_loss import IGNORED, chunk_rows, label_loss
from thrifty.objective import installed_plan
from thrifty.objective.heads import own_logits, unwrapped

from .quiet import check_ids

__all__ = ["example_losses", "file_losses", "mean_of", "sum_losses"]

FORGETTING_WINDOWS = 64
FORGETTING_TOKENS = 512

Row = Mapping[str, Sequence[int]]


def sum_losses(model: nn.Module, rows: Sequence[Row], *, batch_size: int) -> list[tuple[float, int]]:
    """The summed loss over the labels of each row ({"input_ids", "labels"}), and their number, in the rows' order.

    Up to rounding whatever the batches. Inside `evaluating`.
    """
    order = sorted(
        range(len(rows)), key=lambda i: -len(rows[i]["input_ids"])
    )  # the largest batch first: it fails first
    sums = [(0.0, 0)] * len(rows)
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        batch = collate([rows[i] for i in picked], pad_token_id=0)  # padding is masked: any id will do
        for i, loss, targets_T in zip(picked, _row_losses(model, batch), batch["labels"][:, 1:]):
            sums[i] = (loss, int((targets_T != IGNORED).sum()))
    return sums


def mean_of(sums: Sequence[tuple[float, int]]) -> float:
    """The mean loss per label over all rows. ThriftyError where no row has a label."""
    count = sum(labels for _, labels in sums)
    if count == 0:
        raise ThriftyError("the evaluation rows have no labelled token: raise max_length")
    return sum(loss for loss, _ in sums) / count


def example_losses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int,
    batch_size: int,
) -> list[tuple[float, int]]:
    """`sum_losses` of the examples, each cut at `max_length` tokens as in training. Inside `evaluating`."""
    rows, _ = encode_all(examples, tokenizer, max_length=max_length)
    check_ids(model, rows)
    return sum_losses(model, rows, batch_size=batch_size)


def file_losses(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: str, *, max_length: int, batch_size: int
) -> list[tuple[float, int]]:
    """`sum_losses` of a text file's first 64 windows of at most 512 tokens. Inside `evaluating`."""
    length = min(max_length, FORGETTING_TOKENS)
    cut = windows(path, tokenizer, length=length)[:FORGETTING_WINDOWS]
    if not cut:
        raise ThriftyError(f"{path}: no text to measure forgetting on")
    # Windows are longer than answers usually are: no more tokens at once than 8 of them hold.
    return sum_losses(model, [{"input_ids": ids, "labels": ids} for ids in cut], batch_size=min(batch_size, 8))


def _row_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> list[float]:
    """The summed loss over the labels of each row of `batch`: minus the log-likelihood of what is labelled.

    The trunk runs once for all rows, through the model's own forward (and so through what wraps it); its output is
    kept, and the head sees labelled positions only.
    """
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    targets_BT = F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
    plan = installed_plan(model)
    assert plan is not None, "losses are summed inside `evaluating`"
    if plan.path == "own_loss":
        logits_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return [
            _cross_entropy(logits_TV[targets_T != IGNORED], targets_T[targets_T != IGNORED])
            for logits_TV, targets_T in zip(logits_BTV[:, -targets_BT.shape[1] :], targets_BT)
        ]
    target = unwrapped(model)
    trunk, head = target.get_submodule(plan.trunk), target.get_submodule(plan.head)
    outputs: list[Any] = []
    handle = trunk.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        model(**{**batch, "labels": torch.full_like(batch["labels"], IGNORED)})  # the head is run below, row by row
    finally:
        handle.remove()
    output = outputs[0]  # later calls are the stub that the head runs behind
    hidden_BTD = output.last_hidden_state[:, -targets_BT.shape[1] :]  # virtual prompt tokens stand before
    losses = []
    for hidden_TD, targets_T in zip(hidden_BTD, targets_BT):
        if plan.path == "plain_head":
            losses.append(float(label_loss(hidden_TD, head.weight, targets_T, bias=head.bias)))
        else:
            losses.append(_own_head_loss(target, trunk, type(output), hidden_TD, targets_T))
    return losses


def _own_head_loss(target: Any, trunk: nn.Module, output: type, hidden_TD: Tensor, targets_T: Tensor) -> float:
    kept = targets_T != IGNORED
    chunk = chunk_rows(int(target.config.get_text_config().vocab_size))
    total = 0.0
    for hidden_cD, targets_c in zip(hidden_TD[kept].split(chunk), targets_T[kept].split(chunk)):
        logits_cV = own_logits(target.forward, trunk, output, hidden_cD)
        total += _cross_entropy(logits_cV, targets_c)
    return total


def _cross_entropy(logits_cV: Tensor, targets_c: Tensor) -> float:
    logits_cV = logits_cV.to(torch.promote_types(logits_cV.dtype, torch.float32))
    return float(F.cross_entropy(logits_cV, targets_c, reduction="sum"))
