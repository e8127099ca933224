"""What a user names when a trained model is wanted: a model, the folder of a run, or a delta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from thrifty.core.errors import ThriftyError

from .config import RunConfig, load_config

__all__ = ["Place", "locate"]

_RUN_FILE, _DELTA, _DELTA_FILE = "run.yaml", "delta", "delta.json"


@dataclass(frozen=True)
class Place:
    """`config.model` is the base model, `delta` the folder of what to apply to it, if anything."""

    config: RunConfig
    delta: str | None


def locate(name: str, *, delta: str | None = None, file: str | None = None, settings: Sequence[str] = ()) -> Place:
    """Find the base model, its delta and its configuration.

    name: a model, the folder of a run (its `run.yaml` names the base) or of a delta (of the run around it). `delta`
    takes the place of the run's own; `file` and `settings` (`key=value`) that of the run's configuration.
    """
    folder = Path(name)
    if (folder / _DELTA_FILE).is_file():
        if delta is not None:
            raise ThriftyError(f"{name} is a delta, and {delta} is given too: name the base model and one delta")
        if not (folder.parent / _RUN_FILE).is_file():
            raise ThriftyError(
                f"{name} is a delta without its run: name its base model (--base MODEL; eval and chat: "
                f"MODEL --delta {name})"
            )
        delta, folder = name, folder.parent
    if not (folder / _RUN_FILE).is_file():
        return Place(load_config(file, [*settings, f"model={name}"], needs_training_data=False), delta)
    config = load_config(file or folder / _RUN_FILE, settings, needs_training_data=False)
    if delta is None:
        delta = str(folder / _DELTA)
        if not (folder / _DELTA / _DELTA_FILE).is_file():
            raise ThriftyError(
                f"{folder} holds no delta yet: finish the run with `thrifty train {folder / _RUN_FILE} "
                "resume_from_checkpoint=auto`"
            )
    return Place(config, delta)
