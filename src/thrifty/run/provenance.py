"""What a run was made with and from: sources, machine, files. Enough to make it again and to say what differs."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import thrifty
from thrifty.core.errors import ThriftyError
from thrifty.core.files import file_sha256
from thrifty.data.readers import expand

from .config import RunConfig
from .summary import data_fingerprint, model_fingerprint

if TYPE_CHECKING:
    from .rows import Rows

__all__ = ["commit", "data_files", "heading", "machine", "record_of"]


def commit() -> str | None:
    """The git commit of thrifty's own sources, with `-dirty` where they were changed since; None for an installed
    package, whichever repository it may lie in."""
    git = ["git", "-C", str(Path(thrifty.__file__).parent)]
    try:
        ours = subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=False)
        if ours.returncode != 0:
            return None
        named = [*git, "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(named, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None


def machine() -> dict[str, Any]:
    """What decides the last bits of a result beside versions: kind of processor, threads."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "accelerator": device,
        "threads": torch.get_num_threads(),
    }


def data_files(config: RunConfig) -> dict[str, dict[str, str]]:
    """`data.train`, `data.eval` -> path as it is written -> SHA-256 of the file, or of a folder's files one by one.

    What comes from the hub has none; its rows' fingerprint covers it. ThriftyError where a file cannot be read.
    """
    return {
        f"data.{name}": dict(sorted(_digests([source.path for source in getattr(config.data, name)]).items()))
        for name in ("train", "eval")
    }


def _digests(paths: list[str]) -> dict[str, str]:
    found = {}
    for path in paths:
        place = Path(expand(path))
        files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
        for file in files:
            name = path if file == place else os.path.join(path, file.relative_to(place))
            try:
                if file.is_file():
                    found[name] = file_sha256(file)
            except OSError as error:
                raise ThriftyError(f"{file}: cannot be read: {error.strerror}") from None
    return found


def heading(record: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """Comment lines for the top of `run.yaml`."""
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [f"{packages}, commit {record['commit'] or 'unknown'}"]
    lines += [f"{key} sha256 {digest}" for key, digest in record["fingerprints"].items()]
    lines += [f"{path} sha256 {digest}" for files in record["files"].values() for path, digest in files.items()]
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


def record_of(config: RunConfig, *, model: nn.Module, rows: Rows, processes: int) -> dict[str, Any]:
    """What every checkpoint of a run notes of it: configuration, fingerprints, files, sources, machine."""
    fingerprints = {"model": model_fingerprint(model), "data.train": data_fingerprint(rows.train)}
    if rows.judged:
        text = json.dumps(rows.judged, sort_keys=True, default=str)
        fingerprints["data.train"] = hashlib.sha256(text.encode()).hexdigest()
    if rows.eval is not None:
        fingerprints["data.eval"] = data_fingerprint(rows.eval)
    return {
        "config": config.to_dict(),
        "fingerprints": fingerprints,
        "files": data_files(config),
        "commit": commit(),
        "machine": machine(),
        "processes": processes,
        "before": None,
    }
