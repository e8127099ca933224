"""A delta as PEFT's SHiRA adapter (Bhardwaj et al. 2024, "Sparse High Rank Adapters"): single entries of linear layers.

PEFT stores r (in + out) entries of every module, with one r for all: as many as a LoRA pair of rank r. Places that the
delta does not need hold zeros.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.errors import ThriftyError
from .adapter import PREFIX, check_base, common_config, target_names, write_adapter
from .algebra import dense_change
from .delta import Delta

__all__ = ["save_shira"]


def save_shira(delta: Delta, folder: str | os.PathLike[str], model: nn.Module, *, base_model: str | None = None) -> int:
    """Write `delta` as the SHiRA adapter folder that `PeftModel.from_pretrained` loads, and return its r.

    model: the base, which stays as it is; base_model: its name in the configuration, by default the one that it was
    loaded from. What PEFT computes, base + change in float32, differs from the trained values by rounding alone.
    ThriftyError where something else than weights of linear layers changed, or a matrix is too small for the common r.
    """
    check_base(delta, model)
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    shapes: dict[str, tuple[int, ...]] = {}
    needed: dict[str, int] = {}
    for name, piece in delta.pieces.items():
        module, _, attribute = name.rpartition(".")
        layer = model.get_submodule(module)
        if attribute != "weight" or not isinstance(layer, nn.Linear) or holders[id(layer.weight)] > 1:
            raise ThriftyError(
                f"SHiRA changes weights of linear layers only, and {name} is none, or is tied: convert to LoRA, or "
                "merge the delta into a checkpoint instead"
            )
        shapes[module] = piece.shape
        needed[module] = -(-int(dense_change(piece).count_nonzero()) // sum(piece.shape))
    r = max(1, *needed.values())
    for module, (rows, columns) in shapes.items():
        if r * (rows + columns) > rows * columns:
            raise ThriftyError(
                f"{max(needed, key=needed.__getitem__)} needs SHiRA's r = {r}, which is one for all modules, and "
                f"{module} of {rows} x {columns} has no {r * (rows + columns):,} entries: convert to LoRA instead"
            )
    state: dict[str, Tensor] = {}
    for module in shapes:
        index, values = _entries(dense_change(delta.pieces[f"{module}.weight"]), r * sum(shapes[module]))
        state[f"{PREFIX}{module}.shira_weight"] = values
        state[f"{PREFIX}{module}.shira_indices"] = index
    config = {
        **common_config("SHIRA", model, base_model=base_model),
        "r": r,
        "mask_type": "random",  # drawn when PEFT makes the layers, and replaced by the stored places
        "target_modules": target_names(shapes, model),
        "fan_in_fan_out": False,
    }
    write_adapter(Path(folder), state, config)
    return r


def _entries(change: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Places int32 `[2, count]` and values float32 `[count]` of all that changed, and of as many others as it takes."""
    changed = change.flatten() != 0
    index = changed.nonzero()[:, 0]
    index = torch.cat([index, (~changed).nonzero()[: count - len(index), 0]])
    rows = index.div(change.shape[1], rounding_mode="floor")
    return torch.stack([rows, index % change.shape[1]]).to(torch.int32), change.flatten()[index].float()
