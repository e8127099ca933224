"""A plan from the folder of a run, a delta or a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from ..core.budget import Budget
from ..core.errors import ThriftyError, unknown
from ..core.plan import Plan, plan_from_files
from ..delta import Delta
from .fixed import FixedSize

__all__ = ["Saved"]


@dataclass(frozen=True, kw_only=True)
class Saved(FixedSize):
    """What another run trained. `plan`: the folder of a finished run (its delta), of a delta, or of a checkpoint (of
    a sparsegrad run only a checkpoint, which holds the basis). A budget beside it is only checked."""

    plan: str

    def __post_init__(self) -> None:
        if not isinstance(self.plan, str) or not self.plan:
            raise ThriftyError(f"plan {self.plan!r} is not valid: give the folder of a run, a delta or a checkpoint")

    def select(self, model: nn.Module, *, probe: object, budget: Budget | None, seed: int) -> Plan:
        plan = self._read()
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        for name, shape in plan.shapes.items():
            if name not in shapes:
                raise ThriftyError(f"the plan in {self.plan} is of another model: {unknown('parameter', name, shapes)}")
            if shapes[name] != shape:
                raise ThriftyError(
                    f"the plan in {self.plan} is of another model: {name} is {shapes[name]} here, {shape} there; "
                    "give a plan of a model of the same shape"
                )
        return Plan.of(model, plan, kept_columns=plan.kept_columns)

    def _read(self) -> Plan:
        folder = Path(self.plan).expanduser()
        if (folder / "plan.json").is_file():
            file = folder / "plan.safetensors"
            tensors = load_file(file) if file.exists() else {}
            return plan_from_files(json.loads((folder / "plan.json").read_text(encoding="utf-8")), tensors)
        found = next((f for f in (folder / "delta", folder) if (f / "delta.json").is_file()), None)
        if found is None:
            raise ThriftyError(
                f"plan: {self.plan!r} holds no plan: give the folder of a finished run, its delta or a checkpoint"
            )
        delta = Delta.load(found)
        rotated = next((name for name in ("sparsegrad", "gradient_axes") if name in delta.method), None)
        if rotated is not None:
            raise ThriftyError(
                f"plan: {found} is the delta of a {rotated} run, which holds what changed but not the basis: give a "
                "checkpoint of that run (save_steps), such as its folder checkpoint-100"
            )
        plan = delta.plan
        if not plan:
            raise ThriftyError(f"plan: {found} is an adapter, which chose no places in the weights: give another run")
        return plan
