"""Whether a folder holds a model that can be loaded."""

from __future__ import annotations

from pathlib import Path

from thrifty.core.errors import ThriftyError

__all__ = ["check_config", "check_tensors"]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_config(folder: Path) -> None:
    """ThriftyError where `folder` is none of a model: the nearest one, or what it is instead."""
    if not (folder / "config.json").is_file():
        inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"; did you mean {str(folder / inner[0])!r}?" if inner else ""
        if (folder / "adapter_config.json").is_file():
            hint = ": it is a PEFT adapter; set model to its base"
        elif (folder / "delta.json").is_file():
            hint = ": it is a delta; set model to its base"
        raise ThriftyError(f"model folder {str(folder)!r} has no config.json{hint}")


def check_tensors(folder: Path) -> None:
    """ThriftyError where it holds no weights that can be loaded."""
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ThriftyError(
            f"model folder {str(folder)!r} holds its weights as a pickle ({pickles[0]}), which can run any code and is "
            "never loaded: convert it to safetensors (save_pretrained in the environment that made it)"
        )
    raise ThriftyError(f"model folder {str(folder)!r} has no *.safetensors")
