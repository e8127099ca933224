"""A user's batches, cut again into units of few rows: what is measured on units does not depend on the batching."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias

from thrifty.core.errors import ThriftyError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["units"]

# One row: its tensors without the batch dimension, and the names of those that run along its columns.
_UnitRow: TypeAlias = "tuple[dict[str, Tensor], frozenset[str]]"


def units(batches: Iterable[Mapping[str, Tensor]], *, rows: int = 4) -> Iterator[dict[str, Tensor]]:
    """The rows of `batches` in their order, `rows` at a time (the last unit may be smaller).

    Each row is trimmed to its attended columns, from the first to the last 1 of its `attention_mask` (all, where there
    is no mask), then units are padded on the right: labels with -100, all else with 0. So the units are the same
    whatever the batch size, the padding side and the padded length were. Tensors whose second dimension is that of
    `input_ids` are trimmed along, except labels that are not integers; all others are stacked. An `attention_mask` is
    added where rows that came without one are padded. Lazy: holds at most one unit and one batch.

    Raises `ThriftyError` for what is no batch of tensors, or rows that do not fit together.
    """
    if rows < 1:
        raise ThriftyError(f"units of {rows} rows; at least 1 is needed")
    waiting: list[_UnitRow] = []
    for batch in batches:
        for row in _rows_of(batch):
            waiting.append(row)
            if len(waiting) == rows:
                yield _joined(waiting)
                waiting = []
    if waiting:
        yield _joined(waiting)


def _rows_of(batch: Mapping[str, Tensor]) -> Iterator[_UnitRow]:
    from torch import Tensor

    if not isinstance(batch, Mapping) or not batch:
        raise ThriftyError("each batch must be a dict of tensors with input_ids, attention_mask, labels")
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            what = "a single number" if isinstance(value, Tensor) else type(value).__name__
            raise ThriftyError(
                f"batch[{name!r}] is {what}; each value of a batch must be a tensor with one entry per row"
            )
    lead_name = next((n for n in ("input_ids", "inputs_embeds", "attention_mask") if n in batch), next(iter(batch)))
    lead = batch[lead_name]
    count = lead.shape[0]
    for name, value in batch.items():
        if value.shape[0] != count:
            raise ThriftyError(f"batch[{name!r}] has {value.shape[0]} rows, but {lead_name!r} has {count}")
    has_columns = lead_name in ("input_ids", "inputs_embeds", "attention_mask") and lead.dim() > 1
    columns = lead.shape[1] if has_columns else None
    mask = batch.get("attention_mask")
    if mask is not None and (mask.dim() != 2 or mask.shape[1] != columns):
        raise ThriftyError(f"attention_mask has the shape {tuple(mask.shape)}; it must be [rows, columns] as input_ids")
    along = frozenset(
        name for name, value in batch.items() if columns is not None and _runs_along(name, value, columns)
    )
    for i in range(count):
        span = _attended(mask[i]) if mask is not None else slice(None)
        yield {name: value[i][span] if name in along else value[i] for name, value in batch.items()}, along


def _runs_along(name: str, value: Tensor, columns: int) -> bool:
    # Labels of several classes at once are floats [B, classes], which may be as many as there are columns.
    return value.dim() > 1 and value.shape[1] == columns and not (name == "labels" and value.is_floating_point())


def _attended(mask: Tensor) -> slice:
    """From the first to the last attended column; of a row that attends nothing one column, lest a unit be empty."""
    attended = mask.nonzero()
    return slice(int(attended[0]), int(attended[-1]) + 1) if len(attended) else slice(0, 1)


def _joined(unit: list[_UnitRow]) -> dict[str, Tensor]:
    import torch

    first, along = unit[0]
    for row, row_along in unit[1:]:
        if row.keys() != first.keys() or row_along != along:
            differ = sorted((row.keys() ^ first.keys()) | (row_along ^ along))
            raise ThriftyError(f"batches do not fit together: they differ in {', '.join(differ)}")
    lengths = [len(row[name]) for row, _ in unit for name in sorted(along)[:1]]
    joined = {}
    for name in first:
        values = [row[name] for row, _ in unit]
        if name in along:
            joined[name] = torch.nn.utils.rnn.pad_sequence(
                values, batch_first=True, padding_value=-100 if name == "labels" else 0
            )
        else:
            if any(value.shape != values[0].shape for value in values):
                raise ThriftyError(f"batches do not fit together: rows of {name!r} differ in shape")
            joined[name] = torch.stack(values)
    if "attention_mask" not in first and len(set(lengths)) > 1:
        lead = joined[sorted(along)[0]]
        ends = torch.tensor(lengths, device=lead.device)[:, None]
        joined["attention_mask"] = (torch.arange(lead.shape[1], device=lead.device) < ends).to(torch.int64)
    return joined
