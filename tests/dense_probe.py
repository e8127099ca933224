"""Plain dense autograd, in plain loops: what the probe and the selector must agree with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["Scored", "block_scores", "candidates", "greedy", "inside_strips", "unit_gradients"]

Batch = Mapping[str, Tensor]
Scored = list[tuple[float, int, str, tuple[int, ...]]]  # score, numbers, parameter, block index


def candidates(model: nn.Module) -> dict[str, bool]:
    """Parameters that all-linear stands for -> is it stored [in, out]?"""
    embeddings = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    found = {}
    for name, p in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        linear = type(module) in (nn.Linear, Conv1D) or "experts" in name
        if linear and p.ndim >= 2 and not any(p is e for e in embeddings):
            found[name] = type(module) is Conv1D
    return found


def unit_gradients(model: nn.Module, batches: Sequence[Batch], *, rows: int = 4) -> list[dict[str, Tensor]]:
    """The dense gradient of the model's own mean loss on each unit of `rows` rows."""
    every = [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))]
    found = []
    for start in range(0, len(every), rows):
        unit = {k: torch.stack([row[k] for row in every[start : start + rows]]) for k in every[0]}
        model.zero_grad()
        model(**unit).loss.backward()
        found.append({n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return found


def _score(score: str, gradients: list[Tensor], weight: Tensor) -> float:
    units, numbers = len(gradients), weight.numel()
    if score == "abs_grad":
        total = sum(float(g.abs().sum()) for g in gradients)
    elif score == "accumulated_grad":
        total = float(torch.stack(gradients).sum(0).abs().sum())
    elif score == "signed_grad":
        total = abs(sum(float(g.sum()) for g in gradients))
    elif score == "squared_grad":
        total = sum(float((g * g).sum()) for g in gradients)
    else:
        total = sum(float((weight * g).abs().sum()) for g in gradients)
    return total / units / numbers


def block_scores(
    model: nn.Module, units: list[dict[str, Tensor]], *, score: str, size: tuple[int, int], names: Mapping[str, bool]
) -> Scored:
    """(score, numbers, parameter, block index) of every block of `size` (outputs, inputs)."""
    found = []
    for name, transposed in names.items():
        weight = model.get_parameter(name).detach().double()
        h, w = (size[1], size[0]) if transposed else size
        h, w = min(h, weight.shape[-2]), min(w, weight.shape[-1])
        for expert in range(weight.shape[0]) if weight.ndim == 3 else [None]:
            lead = () if expert is None else (expert,)
            for i in range(-(-weight.shape[-2] // h)):
                for j in range(-(-weight.shape[-1] // w)):
                    cut = (*lead, slice(i * h, (i + 1) * h), slice(j * w, (j + 1) * w))
                    value = _score(score, [unit[name][cut] for unit in units], weight[cut])
                    found.append((value, weight[cut].numel(), name, (*lead, i, j)))
    return found


def greedy(blocks: Scored, ceiling: int) -> dict[str, set[tuple[int, ...]]]:
    """The best blocks, each taken if it still fits."""
    chosen: dict[str, set[tuple[int, ...]]] = {}
    for _, numbers, name, index in sorted(blocks, key=lambda block: -block[0]):
        if numbers <= ceiling:
            ceiling -= numbers
            chosen.setdefault(name, set()).add(index)
    return chosen


def inside_strips(
    model: nn.Module, blocks: Scored, *, groups: Sequence[Sequence[str]], names: Mapping[str, bool], share: float
) -> Scored:
    """The blocks in the best strips that `share` of the distinct columns buys, and those in no group's matrices.

    groups: the parameters that read each input. The score of a strip: its blocks' sums, per column.
    """
    group_of = {name: i for i, group in enumerate(groups) for name in group}

    def place(block: tuple[float, int, str, tuple[int, ...]]) -> tuple[int, int]:
        return group_of[block[2]], block[3][0 if names[block[2]] else 1]

    def inputs(name: str) -> int:
        return model.get_parameter(name).shape[0 if names[name] else 1]

    def outputs(name: str) -> int:
        return model.get_parameter(name).shape[1 if names[name] else 0]

    sums: dict[tuple[int, int], float] = {}
    widths: dict[tuple[int, int], int] = {}
    for block in blocks:
        if block[2] in group_of:
            at, first = place(block), block[2] == groups[place(block)[0]][0]
            sums[at] = sums.get(at, 0.0) + block[0] * block[1]
            widths[at] = widths.get(at, 0) + (block[1] if first else 0)
    widths = {at: numbers // outputs(groups[at[0]][0]) for at, numbers in widths.items()}
    strips = [(total / widths[at], widths[at], "strip", at) for at, total in sums.items()]
    best = greedy(strips, int(share * sum(inputs(group[0]) for group in groups))).get("strip", set())
    return [block for block in blocks if block[2] not in group_of or place(block) in best]
