"""Reading original values again from where the model was loaded, when keeping them would cost too much memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.errors import ThriftyError
from ..delta.delta import APPLIED

__all__ = ["base_tensors", "can_read_base"]


def can_read_base(model: nn.Module) -> bool:
    """Was `model` loaded from a local folder of safetensors, without quantization, and no delta applied since?"""
    if not isinstance(model, PreTrainedModel) or getattr(model, "is_quantized", False) or getattr(model, APPLIED, 0):
        return False
    folder = Path(str(model.name_or_path or "/nonexistent"))
    # a class that the folder was not saved from would get fresh random weights for what the folder lacks
    same = getattr(model.config, "architectures", None) == [type(model).__name__]
    return same and folder.is_dir() and any(folder.glob("*.safetensors"))


def base_tensors(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors `names` as the folder holds them, in the model's dtype."""
    assert isinstance(model, PreTrainedModel)
    fresh = type(model).from_pretrained(model.name_or_path, dtype=model.dtype, use_safetensors=True)
    held = dict(fresh.named_parameters())
    for name in names:
        if name not in held:
            raise ThriftyError(
                f"{name} is not in {model.name_or_path}: was the folder replaced while the model trained?"
            )
    return {name: held[name].detach() for name in names}
