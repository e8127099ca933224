"""The supervised contrastive loss of the answers: what a probe can look at instead of the loss that is trained.

N rows that have an answer, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ThriftyError
from ..data.units import units

__all__ = ["TEMPERATURE", "answered_units", "contrastive_loss", "supervised_contrastive"]

TEMPERATURE = 0.1


def contrastive_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """`supervised_contrastive` of the rows of `batch`: the feature of a row is what the head would read at the last
    token before the answer, its class the answer's label ids. ThriftyError where the model has no head."""
    inputs, index, classes = _prompts(batch)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ThriftyError(
            f"loss 'contrastive' needs a language model with an output head, {type(model).__name__} has none: "
            "use loss 'task'"
        )
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(args[0][torch.arange(len(index), device=index.device), index])
        return (seen[-1][:, None], *args[1:])  # no logits but these

    hook = head.register_forward_pre_hook(keep)
    try:
        model(**inputs)
    finally:
        hook.remove()
    return supervised_contrastive(seen[-1], classes)


def supervised_contrastive(features_ND: Tensor, classes_N: Tensor) -> Tensor:
    """Khosla et al. 2020, L_out: with z = features / |features| and t = TEMPERATURE, the mean over rows i that have
    others of their class, P(i), of `-1/|P(i)| sum over p in P(i) of log(exp(z_i z_p / t) / sum over a != i of exp(z_i
    z_a / t))`. A scalar, float32 or wider; 0 where no two rows share a class."""
    z_ND = features_ND.to(torch.promote_types(features_ND.dtype, torch.float32))
    z_ND = z_ND / z_ND.norm(dim=1, keepdim=True).clamp(min=1e-12)
    itself = torch.eye(len(z_ND), dtype=torch.bool, device=z_ND.device)
    same_NN = (classes_N[:, None] == classes_N) & ~itself
    count_N = same_NN.sum(1)
    if not bool(count_N.any()):
        return z_ND.sum() * 0.0
    similar_NN = (z_ND @ z_ND.T / TEMPERATURE).masked_fill(itself, -torch.inf)
    log_NN = (similar_NN - similar_NN.logsumexp(1, keepdim=True)).masked_fill(~same_NN, 0.0)
    return -(log_NN.sum(1)[count_N > 0] / count_N[count_N > 0]).mean()


def answered_units(batches: Iterable[Mapping[str, Any]], *, rows: int) -> list[dict[str, Tensor]]:
    """The units of `rows` rows that hold an answer (a label after the first token: nothing predicts that one).
    ThriftyError where none of them holds two rows with the same answer."""
    found = [(unit, _prompts(unit)[2]) for unit in units(batches, rows=rows) if "labels" in unit]
    if any(len(classes.unique()) < len(classes) for _, classes in found):
        return [unit for unit, classes in found if len(classes)]
    raise ThriftyError(
        f"loss 'contrastive': no two of the {rows} rows that are looked at together have the same answer; "
        "give data whose answers repeat (labels of classes), look at more rows together (probe_rows), or use "
        "loss 'task'"
    )


def _prompts(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The rows that have an answer, without labels; the position `[N]` before each first label; the class `[N]`."""
    labels = batch["labels"].clone()
    labels[:, 0] = -100  # nothing predicts the first
    rows = (labels != -100).any(1)
    index = (labels != -100).int().argmax(1)[rows] - 1
    numbers: dict[tuple[int, ...], int] = {}
    answers = [tuple(row[row != -100].tolist()) for row in labels[rows]]
    classes = [numbers.setdefault(answer, len(numbers)) for answer in answers]
    inputs = {name: v[rows] if isinstance(v, Tensor) else v for name, v in batch.items() if name != "labels"}
    return inputs, index, torch.tensor(classes, device=labels.device)
