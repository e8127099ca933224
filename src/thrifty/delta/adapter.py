"""PEFT's adapter folders: what the conversions to them share, and how far a loaded one is from the delta."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..core.errors import ThriftyError
from ..core.files import disk_errors, new_folder
from .delta import Delta
from .digest import fingerprint
from .peer import PeerDelta, _logits, logit_difference

__all__ = ["CONFIG", "STATE", "adapter_difference", "check_base", "common_config", "target_names", "write_adapter"]

PREFIX = "base_model.model."  # before a module's name in PEFT's files
CONFIG, STATE = "adapter_config.json", "adapter_model.safetensors"


def check_base(delta: Delta, model: nn.Module) -> None:
    """ThriftyError where `model` is not the base of `delta`, or the delta cannot become an adapter at all."""
    if isinstance(delta, PeerDelta):
        raise ThriftyError("this delta is a PEFT adapter already: take the folder adapter/ inside it")
    if delta.new_tokens is not None:
        raise ThriftyError("this delta adds tokens, which an adapter cannot: merge it into a checkpoint instead")
    tensors = delta._fits(model)
    for name, piece in delta.pieces.items():
        if fingerprint(tensors[name]) != piece.fingerprint:
            raise ThriftyError(f"{name} differs from the base of this delta: another base, or a changed one")


def common_config(peft_type: str, model: nn.Module, *, base_model: str | None) -> dict[str, Any]:
    """The keys that every configuration of PEFT has."""
    causal = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    loaded_from = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": base_model or loaded_from,
        "inference_mode": True,
    }


def target_names(modules: Collection[str], model: nn.Module, *, leaving_out: Collection[str] = ()) -> list[str]:
    """The short last names by which PEFT finds exactly `modules`, else their full ones. PEFT compares ends of names."""
    names = [name for name, _ in model.named_modules() if name and name not in leaving_out]
    for listed in ({name.rpartition(".")[2] for name in modules}, set(modules)):
        found = {name for name in names if any(f".{name}".endswith(f".{end}") for end in listed)}
        if found == set(modules):
            return sorted(listed)
    raise ThriftyError(
        f"PEFT finds modules by the ends of their names, and cannot tell {next(iter(modules))} from others: "
        "merge the delta into a checkpoint instead"
    )


def write_adapter(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write PEFT's two files, whole or not at all. ThriftyError where `folder` is in use."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ThriftyError(f"{folder} exists and is not empty: name a new folder, or remove it first")
    with disk_errors(f"the adapter {folder}", fix="free space and convert again"), new_folder(folder) as aside:
        save_file(dict(state), aside / STATE, metadata={"format": "pt"})
        (aside / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")


def adapter_difference(delta: Delta, folder: str | os.PathLike[str], model: nn.Module) -> float:
    """The largest difference between the logits of `model`, the base, with the adapter in `folder` (by PEFT) and with
    `delta` applied, on 32 random tokens. Both are done on copies."""
    try:
        from peft import PeftModel
    except ImportError:
        raise ThriftyError("PEFT is not installed: pip install 'thrifty[peft]' to try the adapter") from None
    found = _logits(PeftModel.from_pretrained(copy.deepcopy(model), str(folder)))
    return logit_difference(_logits(delta.apply(copy.deepcopy(model))), found)
