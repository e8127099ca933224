"""Reading original values again from where the model was loaded, when keeping them would cost too much memory."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.errors import ThriftyError
from ..core.tensor_file import TensorFile
from ..delta.delta import APPLIED

__all__ = ["Originals", "base_tensors", "can_read_base"]


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


class Originals:
    """The weights of a quantized `model` as they were before, read one at a time from where it was loaded.

    ThriftyError where that is not known, or where a delta was applied since.
    """

    def __init__(self, model: nn.Module) -> None:
        name = str(getattr(model, "name_or_path", "") or "")
        self._folder = Path(name)
        if name and not self._folder.is_dir():
            with suppress(LocalEntryNotFoundError, HFValidationError):
                self._folder = Path(snapshot_download(name, local_files_only=True))
        files = sorted(self._folder.glob("*.safetensors")) if name and self._folder.is_dir() else []
        if not files or getattr(model, APPLIED, False):
            raise ThriftyError(
                f"blocks of a quantized weight start from its original values, which {name or 'this model'!r} does not "
                "hold: load the base with from_pretrained, from a folder or a hub id, with no delta in it"
            )
        self._files = [TensorFile(file) for file in files]

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor, in the dtype that the folder holds it in."""
        for file in self._files:
            if name in file:
                return file[name]
        raise ThriftyError(
            f"{name} is not in {self._folder} under this name, so its original values cannot be read: save the model "
            "with save_pretrained first, and load that folder"
        )
