"""Plan: parameter name -> Region, printable, and its form in files."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .budget import distinct_parameters
from .entries import Entries
from .errors import ThriftyError, unknown
from .low_rank import LowRank
from .projected import Projected
from .region import Blocks, Region, Whole
from .rotated import Rotated

__all__ = ["Plan", "kind_of", "layer_of", "plan_from_files", "plan_to_files", "region_from_files"]

_ATTENTION = re.compile(r"attn|attention|c_attn|qkv|query|key|value|(^|\.)[qkvo]_proj")
_MLP = re.compile(r"mlp|ffn|feed_forward|experts|moe|fc\d|intermediate|output\.dense|gate_proj|up_proj|down_proj")
_LAYER = re.compile(r"\.(\d+)\.")


def kind_of(name: str) -> str:
    """`attention`, `mlp` or `other`, from a parameter's name."""
    if _ATTENTION.search(name):
        return "attention"
    return "mlp" if _MLP.search(name) else "other"


def layer_of(name: str) -> int | None:
    """The number of the layer in a parameter's name, if there is one."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def _form(region: Region) -> str:
    if isinstance(region, Projected):
        return f"projected {region.core[0]} x {region.core[1]}"
    return f"low_rank r={region.r}" if isinstance(region, LowRank) else region.kind


def _ranges(numbers: Sequence[int]) -> str:
    """`0, 2-5` of 0, 2, 3, 4, 5."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


class Plan(Mapping[str, Region]):
    """Which region of which parameter is trained. Immutable; iterates in the model's own order.

    kept_columns: where it is known which matrices read the same input, how many distinct input columns the tuned linear
    layers keep for backward, and of how many.
    """

    def __init__(
        self,
        regions: Mapping[str, Region],
        *,
        shapes: Mapping[str, tuple[int, ...]],
        total: int,
        kept_columns: tuple[int, int] | None = None,
    ) -> None:
        self._regions = dict(regions)
        self.kept_columns = kept_columns
        self.shapes = {name: tuple(shapes[name]) for name in self._regions}
        self.total = total
        for name, region in self._regions.items():
            region.check(name, self.shapes[name])
        self.sizes = {name: region.size(self.shapes[name]) for name, region in self._regions.items()}

    @classmethod
    def of(
        cls, model: nn.Module, regions: Mapping[str, Region], *, kept_columns: tuple[int, int] | None = None
    ) -> Plan:
        """A plan for `model`; ThriftyError where it names a parameter that is not there."""
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        for name in regions:
            if name not in shapes:
                raise ThriftyError(unknown("parameter", name, shapes))
        ordered = {name: regions[name] for name in shapes if name in regions}
        return cls(ordered, shapes=shapes, total=distinct_parameters(model), kept_columns=kept_columns)

    def __getitem__(self, name: str) -> Region:
        return self._regions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._regions)

    def __len__(self) -> int:
        return len(self._regions)

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(self.sizes.values())

    @property
    def trainable_share(self) -> float:
        """Trained numbers over the model's distinct parameters."""
        return self.trainable_parameters / self.total

    def digest(self) -> str:
        """SHA-256 of what is trained: equal for equal plans."""
        record, tensors = plan_to_files(self)
        seen = hashlib.sha256(json.dumps(record["regions"], sort_keys=True).encode())
        for name in sorted(tensors):
            seen.update(tensors[name].cpu().contiguous().numpy().tobytes())
        return seen.hexdigest()

    def __str__(self) -> str:
        trained = self.trainable_parameters
        held = sum(  # in a rotated basis every number has its values and state, whichever are trained in a step
            math.prod(self.shapes[name]) if isinstance(region, Rotated) else self.sizes[name]
            for name, region in self.items()
        )
        mib = 16 * held / 2**20
        lines = [
            f"{trained:,} of {self.total:,} numbers trained ({100 * self.trainable_share:.3g}%) in {len(self)} tensors"
            f"; {mib:.1f} MiB for values, gradients and AdamW state"
        ]
        by_kind: Counter[str] = Counter()
        by_layer: Counter[int] = Counter()
        for name, size in self.sizes.items():
            by_kind[kind_of(name)] += size
            if (layer := layer_of(name)) is not None:
                by_layer[layer] += size
        lines.append(
            "by kind:  " + "  ".join(f"{k} {n:,} ({100 * n / trained:.0f}%)" for k, n in by_kind.most_common())
        )
        if by_layer:
            lines.append("by layer: " + "  ".join(f"{i}: {100 * by_layer[i] / trained:.1f}%" for i in sorted(by_layer)))
        if len({region.kind for region in self.values()}) > 1:
            lines += self._forms()
        if self.kept_columns is not None:
            kept, of = self.kept_columns
            lines.append(f"inputs:   {kept:,} of {of:,} distinct columns kept for backward ({100 * kept / of:.1f}%)")
        return "\n".join(lines)

    def _forms(self) -> list[str]:
        """For each form that is trained (whole tensors, blocks, low-rank pairs, ...): how much of it, and where."""
        lines = []
        for form in dict.fromkeys(_form(region) for region in self.values()):
            names = [name for name, region in self.items() if _form(region) == form]
            layers = sorted({layer for name in names if (layer := layer_of(name)) is not None})
            outside = "" if all(layer_of(name) is not None for name in names) else ", others outside"
            where = f"layers {_ranges(layers)}{outside}" if layers else "outside the layers"
            lines.append(
                f"{form}: {sum(self.sizes[name] for name in names):,} numbers in {len(names)} tensors, {where}"
            )
        return lines

    def __repr__(self) -> str:
        return f"Plan({self.trainable_parameters:,} numbers in {len(self)} tensors)"


def plan_to_files(plan: Plan) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A JSON record and the index tensors by parameter name."""
    records: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    shared: dict[int, str] = {}  # a basis is written once, under the first that has it
    for name, region in plan.items():
        record, index = region.to_files()
        if isinstance(region, Rotated):
            record["basis"] = shared.setdefault(id(region.basis), name)
            index = index if record["basis"] == name else None
        records[name] = record | {"of": list(plan.shapes[name])}
        if index is not None:
            tensors[name] = index
    kept = {} if plan.kept_columns is None else {"kept_columns": list(plan.kept_columns)}
    return {"total": plan.total, "regions": records} | kept, tensors


def plan_from_files(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Plan:
    """The plan that `plan_to_files` wrote."""
    regions: dict[str, Region] = {}
    for name, entry in record["regions"].items():
        holder = entry.get("basis", name)
        region = region_from_files(entry, tensors.get(holder))
        first = regions.get(holder)
        if isinstance(region, Rotated) and isinstance(first, Rotated):
            region = replace(region, basis=first.basis)
        regions[name] = region
    shapes = {name: tuple(entry["of"]) for name, entry in record["regions"].items()}
    kept = record.get("kept_columns")
    return Plan(
        regions, shapes=shapes, total=int(record["total"]), kept_columns=None if kept is None else (kept[0], kept[1])
    )


def region_from_files(record: Mapping[str, Any], index: Tensor | None) -> Region:
    """The region that `to_files` described; ThriftyError where the record makes no sense."""
    kind = record.get("kind")
    if kind == Whole.kind:
        return Whole()
    if kind == Blocks.kind:
        shape = record.get("shape")
        if index is None or index.is_floating_point():
            raise ThriftyError("a blocks region needs an integer index tensor")
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int for n in shape):
            raise ThriftyError(f"a blocks region needs a shape of two integers, not {shape!r}")
        return Blocks((shape[0], shape[1]), index)
    if kind == Entries.kind:
        if index is None or index.is_floating_point():
            raise ThriftyError("an entries region needs an integer index tensor")
        return Entries(index)
    if kind == LowRank.kind:
        r, alpha = record.get("r"), record.get("alpha")
        if type(r) is not int or not isinstance(alpha, int | float):
            raise ThriftyError(f"a low-rank region needs an integer r and a number alpha, not {r!r} and {alpha!r}")
        return LowRank(r, float(alpha))
    if kind == Rotated.kind:
        return Rotated.from_files(dict(record), index)
    if kind == Projected.kind:
        return Projected.from_files(dict(record), index)
    known = [Whole.kind, Blocks.kind, Entries.kind, LowRank.kind, Rotated.kind, Projected.kind]
    raise ThriftyError(unknown("kind of region", str(kind), known))
