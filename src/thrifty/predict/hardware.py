"""Hardware profiles: peak and achievable rates, memory, power; from YAML files of the package and of the user."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import ThriftyError, unknown
from ..core.files import disk_errors, write_text
from ..core.memory import total_memory

__all__ = ["Hardware", "find_hardware", "hardware_names", "save_hardware"]

_MEASURED = "this machine"
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device.

    Attributes:
        tflops: peak of matrix products by dtype, 10^12 a second; `share` of it is reached, `attention_share` by fused
            attention.
        bandwidth_gbs: peak of memory, 10^9 bytes a second; `bandwidth_share` of it is reached.
        mapping_gbs: 10^9 bytes a second of large blocks that the system maps anew; 0: that costs nothing (GPUs cache).
        call_us: seconds x 10^-6 that every operation takes besides.
        slack: what the allocator holds beyond what lives, as a share of all that comes and goes in a step.
        heap: of a processor, whose allocator is a heap without a cache: `settled` of `heap.Heap`; 0: there is none.
        framework_gb: what the process holds before the model.
        memory_gb: 10^9 bytes; 0: what a process on this machine may take.
    """

    name: str
    device: str
    memory_gb: float
    tflops: Mapping[str, float]
    bandwidth_gbs: float
    share: float = 0.5
    attention_share: float = 0.3
    bandwidth_share: float = 0.75
    mapping_gbs: float = 0.0
    call_us: float = 5.0
    slack: float = 0.05
    heap: float = 0.0
    framework_gb: float = 0.6
    watts: float = 0.0
    source: str = ""

    @property
    def memory_bytes(self) -> float:
        return 1e9 * self.memory_gb if self.memory_gb else float(total_memory())

    def seconds(self, work: Mapping[str, float]) -> dict[str, float]:
        """Of `work` as a Ledger counts it, by part: products, attention, memory, calls."""
        found = dict.fromkeys(("products", "attention", "memory", "calls"), 0.0)
        for sort, amount in work.items():
            kind, _, dtype = sort.partition(".")
            if kind in ("products", "attention"):
                share = self.share if kind == "products" else self.attention_share
                peak = self.tflops.get(dtype, self.tflops["float32"])
                found[kind] += amount / (1e12 * peak * share)
            elif kind == "bytes":
                found["memory"] += amount / (1e9 * self.bandwidth_gbs * self.bandwidth_share)
            elif kind == "mapped" and self.mapping_gbs:
                found["memory"] += amount / (1e9 * self.mapping_gbs)
            elif kind == "calls":
                found["calls"] += amount * 1e-6 * self.call_us
        return found


def _folder() -> Path:
    if own := os.environ.get("THRIFTY_CACHE"):
        return Path(own).expanduser() / "hardware"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "thrifty" / "hardware"


def _shipped() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((files("thrifty.predict") / "hardware.yaml").read_text())
    return found


def _measured_file() -> Path:
    return _folder() / "measured.yaml"


def hardware_names() -> list[str]:
    """All that `find_hardware` takes; `measured` where --measure has left a profile."""
    return [*_shipped(), *(["measured"] if _measured_file().is_file() else [])]


def find_hardware(name: str | None = None) -> Hardware:
    """The profile `name` (case does not matter), or a YAML file of the same form; None: the measured one of this
    machine, else `cpu`. ThriftyError with the nearest name where there is none, or naming a wrong key."""
    if name is None:
        name = "measured" if _measured_file().is_file() else "cpu"
    if name.endswith((".yaml", ".yml")):
        return _read(Path(name))
    if name == "measured":
        if not _measured_file().is_file():
            raise ThriftyError("hardware 'measured': nothing was measured on this machine yet: give --measure")
        return _read(_measured_file())
    shipped, wanted = _shipped(), name.lower().replace(" ", "-").replace("_", "-")
    if wanted not in shipped:
        raise ThriftyError(unknown("hardware", name, hardware_names()))
    return _make(wanted, shipped[wanted], place="hardware.yaml")


def _read(path: Path) -> Hardware:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ThriftyError(f"hardware {str(path)!r} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ThriftyError(f"hardware {str(path)!r} is no YAML file: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(values, dict) or len(values) != 1 or not isinstance(next(iter(values.values())), dict):
        raise ThriftyError(f"hardware {str(path)!r} must hold one profile, `name: {{device: cpu, tflops: ...}}`")
    ((name, profile),) = values.items()
    return _make(str(name), profile, place=str(path))


def _make(name: str, values: Mapping[str, Any], *, place: str) -> Hardware:
    kinds = {item.name: item for item in dataclasses.fields(Hardware) if item.name != "name"}
    for key, value in values.items():
        if key not in kinds:
            raise ThriftyError(f"{place}: {unknown('key', str(key), kinds)}")
        if key == "tflops":
            good = isinstance(value, dict) and "float32" in value and set(value) <= set(_DTYPES)
            if not good or not all(_positive(rate) for rate in value.values()):
                raise ThriftyError(f"{place}: tflops must be {{float32: ..., bfloat16: ...}} with rates above 0")
        elif kinds[key].type == "float" and not (_positive(value) or value == 0):
            raise ThriftyError(f"{place}: {key} must be a number of 0 or more, not {value!r}")
    for key, item in kinds.items():
        no_default = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if no_default and key not in values:
            raise ThriftyError(f"{place}: {key} is missing from profile {name!r}")
    for key in ("share", "attention_share", "bandwidth_gbs", "bandwidth_share"):
        if key in values and not _positive(values[key]):
            raise ThriftyError(f"{place}: {key} must be above 0")
    return Hardware(name=name, **values)


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def save_hardware(profile: Hardware) -> Path:
    """Keep `profile` as this machine's, in the user's cache; returns the file."""
    values = {item.name: getattr(profile, item.name) for item in dataclasses.fields(Hardware) if item.name != "name"}
    path = _measured_file()
    with disk_errors(str(path), fix="set THRIFTY_CACHE to another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, yaml.safe_dump({_MEASURED: {**values, "tflops": dict(profile.tflops)}}, sort_keys=False))
    return path
