"""How much memory a run may take: of the accelerator, or of the machine, its container, its process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

__all__ = ["free_memory", "total_memory"]

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_LIMIT, _USED = ("memory.max", "memory.limit_in_bytes"), ("memory.current", "memory.usage_in_bytes")


def total_memory(device: str = "cpu") -> int:
    """Bytes: the machine's memory, or less where a control group or the process's own limit allows less; or those of
    `cuda`."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[1])
    limits = [limit for limit, _ in _limits()]
    return min([int(psutil.virtual_memory().total), *limits])


def free_memory(device: str = "cpu") -> int:
    """Bytes that are free now, within the same limits."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    left = [max(0, limit - used) for limit, used in _limits()]
    return min([int(psutil.virtual_memory().available), *left])


def _limits() -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes: each control group's that this process is in (Linux), and of its address space."""
    for group in _groups():
        found = [_number(group, names) for names in (_LIMIT, _USED)]
        if found[0] is not None and found[1] is not None:
            yield found[0], found[1] - min(found[1], _reclaimable(group))
    if sys.platform != "win32":
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            yield soft, int(psutil.Process().memory_info().vms)


def _groups() -> Iterator[Path]:
    """Folders of the control groups that may limit memory, from the innermost outwards; versions 1 and 2."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _GROUPS / "memory" if controllers else _GROUPS
        folder = root / path.strip("/")
        for group in (folder, *folder.parents):
            yield group
            if group == root:
                break


def _number(group: Path, names: tuple[str, ...]) -> int | None:
    for name in names:
        try:
            return int((group / name).read_text())
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
    return None


def _reclaimable(group: Path) -> int:
    """Bytes of files' pages that the system gives back when memory is short."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))
