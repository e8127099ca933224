"""Mean next-token losses, as running sums over batches of rows of similar length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from thrifty.core.errors import ThriftyError
from thrifty.data import collate, windows
from thrifty.objective import sum_loss

__all__ = ["FORGETTING_TOKENS", "FORGETTING_WINDOWS", "file_loss", "mean_loss"]

FORGETTING_WINDOWS = 64
FORGETTING_TOKENS = 512

Row = Mapping[str, Sequence[int]]


def mean_loss(model: nn.Module, rows: Sequence[Row], *, batch_size: int) -> float:
    """The mean loss per label over `rows` ({"input_ids", "labels"}), whatever the batches. Inside `evaluating`."""
    ordered = sorted(rows, key=lambda row: -len(row["input_ids"]))  # the largest batch first: it fails first
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for start in range(0, len(ordered), batch_size):
        batch = collate(ordered[start : start + batch_size], pad_token_id=0)  # padding is masked: any id will do
        loss, labels = sum_loss(model, {name: value.to(device) for name, value in batch.items()})
        total += float(loss)
        count += int(labels)
    if count == 0:
        raise ThriftyError("the evaluation rows have no labelled token: raise max_length")
    return total / count


def file_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: str, *, max_length: int, batch_size: int
) -> float:
    """The mean loss per token of a text file: of its first 64 windows of at most 512 tokens. Inside `evaluating`."""
    length = min(max_length, FORGETTING_TOKENS)
    cut = windows(path, tokenizer, length=length)[:FORGETTING_WINDOWS]
    if not cut:
        raise ThriftyError(f"{path}: no text to measure forgetting on (eval.forgetting)")
    # Windows are longer than answers usually are: no more tokens at once than 8 of them hold.
    return mean_loss(model, [{"input_ids": ids, "labels": ids} for ids in cut], batch_size=min(batch_size, 8))
