"""Rows to one padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from thrifty.data.encode import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["collate"]


def collate(
    rows: Sequence[Mapping[str, Sequence[int]]], *, pad_token_id: int, pad_to_multiple_of: int | None = None
) -> dict[str, Tensor]:
    """{"input_ids", "attention_mask", "labels"}: int64 [B, T], padded on the right (labels with -100).

    T is the longest row, rounded up to a multiple of `pad_to_multiple_of` where given. Rows with `position_ids` are
    packed: instead of the mask, which would hide from transformers that they are, the batch has the positions (in the
    padding they start at 0 again, as in a row of its own) and "tokens", int64 [B]: how many of a row are no padding.
    """
    import torch

    assert rows, "a batch needs at least one row"
    multiple = pad_to_multiple_of or 1
    width = -(-max(len(row["input_ids"]) for row in rows) // multiple) * multiple
    shape = (len(rows), width)
    packed = "position_ids" in rows[0]
    batch = {
        "input_ids": torch.full(shape, pad_token_id, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED, dtype=torch.int64),
    }
    if packed:
        batch["position_ids"] = torch.empty(shape, dtype=torch.int64)
        batch["tokens"] = torch.tensor([len(row["input_ids"]) for row in rows])
    else:
        batch["attention_mask"] = torch.zeros(shape, dtype=torch.int64)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        assert len(row["labels"]) == length, "labels and input_ids of a row differ in length"
        batch["input_ids"][i, :length] = torch.as_tensor(row["input_ids"])
        batch["labels"][i, :length] = torch.as_tensor(row["labels"])
        if packed:
            batch["position_ids"][i, :length] = torch.as_tensor(row["position_ids"])
            batch["position_ids"][i, length:] = torch.arange(width - length)
        else:
            batch["attention_mask"][i, :length] = 1
    return batch
