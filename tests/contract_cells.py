"""The contract's table: one row per method, one cell per (method, family, setting), each trained once and then asked.

A new method needs one row in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from families import FAMILIES, batches, build
from torch import Tensor, nn

from thrifty import attach
from thrifty.kernels import entry_grad, region_grad
from thrifty.kernels.region_ways import BlockByBlock, LineByLine, OneProduct, StripGroup, Way

__all__ = [
    "CELLS",
    "LAYERS",
    "LENGTH",
    "METHODS",
    "ROWS",
    "SETTINGS",
    "STEPS",
    "WAYS",
    "Cell",
    "Row",
    "Trained",
    "logits",
    "named",
    "summed_loss",
]

LAYERS, LENGTH, ROWS, STEPS = 2, 10, 3, 2


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the table says of a method. `exact`: the trained numbers are the stored weights (else it is a peer, which
    PEFT merges within `tolerance` of the logits). `pairs`: some are low-rank pairs, which stay beside their matrix
    while it trains and are then written into it: exactly as their delta says, and within `tolerance` of the logits,
    because rounding W + B A once is not the sum of two rounded products."""

    method: Any
    budget: float | None = None
    probes: bool = False
    exact: bool = True
    pairs: bool = False
    tolerance: Mapping[str, float] | None = None
    blocks: bool = False  # does it choose square blocks under a budget?
    entries: bool = False  # can it train single numbers, so that any budget buys something?
    scheduled: bool = False  # does the plan change while it trains?
    families: tuple[str, ...] = FAMILIES


_LINEAR = r".*\.(q_proj|k_proj|v_proj|c_attn|c_proj|up_proj)"
_MERGED = {"float32": 5e-5, "float32+bf16": 5e-5, "bfloat16": 0.3}
METHODS = {
    # sizes that divide none of 20, 40, 72, 120, so that every matrix has ragged edges
    "smt": Row(method={"smt": {"block_size": 14}}, budget=0.02, probes=True, blocks=True),
    "strip_first": Row(
        method={"smt": {"block_size": [14, 6], "scope": "per_kind", "input_budget": "12%"}},
        budget=0.02,
        probes=True,
        blocks=True,
    ),
    "random_blocks": Row(
        method={"random_blocks": {"block_size": [7, 11], "scope": "global"}}, budget=0.02, blocks=True
    ),
    "random_rows": Row(method="random_rows", budget=0.02),
    "random_columns": Row(method="random_columns", budget=0.02),
    "random_entries": Row(method="random_entries", budget=0.02, entries=True),
    "magnitude": Row(method={"magnitude": {"scope": "per_kind"}}, budget=0.02, entries=True),
    "muon_columns": Row(method="muon_columns", budget=0.02, probes=True),
    "lift": Row(method={"lift": {"rank": 4}}, budget=0.05, entries=True),
    "loki": Row(method="loki", budget=0.05, probes=True),
    "senszo_mask": Row(method="senszo_mask", budget=0.02, probes=True, entries=True),
    "gps": Row(method="gps", budget=0.05, probes=True),
    "diablo": Row(method={"diablo": {"blocks": 7}}),
    "sparsegrad": Row(method="sparsegrad", budget=0.02, probes=True),
    "gradient_axes": Row(method="gradient_axes", budget=0.02, probes=True, pairs=True, tolerance=_MERGED),
    "bitfit": Row(method="bitfit", families=("qwen2", "gpt2")),
    "telly": Row(method={"telly": {"freeze": 1}}),
    "locft_bf": Row(method="locft_bf"),
    "custom": Row(
        method=[
            {"select": {"blocks": {"block_size": 14, "target_modules": r".*attn.*"}}},
            {"select": {"rows": {"target_modules": r".*mlp.*"}}, "budget": 0.01},
            {"select": "norms"},
        ],
        budget=0.03,
        probes=True,
    ),
    "spt_sensitivity": Row(
        method={"spt_sensitivity": {"r": 1, "threshold": 0.5}},
        budget=0.02,
        probes=True,
        entries=True,
        pairs=True,
        tolerance=_MERGED,
    ),
    "spafit": Row(method={"spafit": {"r": 2}}, pairs=True, tolerance=_MERGED, families=("qwen2", "gpt2")),
    "spafit_norms": Row(
        method={"spafit": {"r": 2, "middle": 0, "top": -1, "vectors": "norms"}}, pairs=True, tolerance=_MERGED
    ),
    "mixed": Row(
        method=[
            {"select": {"weights": {"target_modules": r".*attn.*"}}, "update": {"low_rank": {"r": 2, "alpha": 4}}},
            {"select": {"entries": {"target_modules": r".*mlp.*"}}},
            {"select": "norms"},
        ],
        budget=0.05,
        probes=True,
        pairs=True,
        tolerance=_MERGED,
    ),
    "full": Row(method="full"),
    # periods so short that the plan changes after the first step, or after the second
    "lisa": Row(method={"lisa": {"layers": 1, "period": 1}}, scheduled=True),
    "hft": Row(method={"hft": {"period": 1}}, scheduled=True),
    "lift_refresh": Row(method={"lift": {"rank": 4, "refresh": 1}}, budget=0.05, entries=True, scheduled=True),
    "composable_sft": Row(method={"composable_sft": {"phase1": 1}}, budget=0.02, entries=True, scheduled=True),
    "greentrainer": Row(method={"greentrainer": {"period": 3}}, scheduled=True),
    "lora": Row(method={"peft": {"peft_type": "LORA", "r": 2}}, exact=False, tolerance=_MERGED),
    # PEFT has no DoRA for stacked experts
    "dora": Row(method={"peft": {"r": 2, "use_dora": True, "target_modules": _LINEAR}}, exact=False, tolerance=_MERGED),
}
# what the weights are held in, and the autocast dtype over it
SETTINGS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "float32+bf16": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, None),
}
# every way to a region's gradient, whatever the rules would choose
WAYS: dict[str, Callable[[StripGroup], Way]] = {
    "block by block": BlockByBlock,
    "by row": lambda group: LineByLine.of(group, by_row=True),
    "by column": lambda group: LineByLine.of(group, by_row=False),
    "one product": OneProduct.of,
}
_ENTRY_COSTS = {"sampled": 0, "dense pieces": 10**9}
CELLS: list[tuple[str, ...]] = [
    (method, family, setting) for method, row in METHODS.items() for family in row.families for setting in SETTINGS
]
CELLS += [
    (method, family, setting, way)
    for ways, methods in ((WAYS, ("smt", "strip_first")), (_ENTRY_COSTS, ("random_entries",)))
    for method in methods
    for family in ("llama", "gpt2")
    for setting in ("float32", "float32+bf16")
    for way in ways
]


def named(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters, by the base's names."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def summed_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The summed next-token loss, written out."""
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    out = out.to(torch.promote_types(out.dtype, torch.float32))
    return F.cross_entropy(out[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


def logits(model: nn.Module) -> Tensor:
    """Logits of one fixed batch, in evaluation mode, without autocast."""
    (batch,) = batches(1, 2, LENGTH, seed=9)
    training = model.training
    with torch.no_grad():
        out = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    model.train(training)
    return out.detach().clone()


@dataclass(frozen=True)
class Cell:
    """One cell: how to build its model, attach its method, and take its steps."""

    name: str
    family: str
    setting: str
    way: str | None = None  # to the gradient; None: what the rules choose

    @contextmanager
    def forced(self) -> Iterator[None]:
        """Gradients computed in this cell's way while it lasts."""
        if self.way in WAYS:
            with patch.object(region_grad, "choose", WAYS[self.way]):
                yield
        elif self.way is not None:
            with patch.object(entry_grad, "_SAMPLE_COST", _ENTRY_COSTS[self.way]):
                yield
        else:
            yield

    @property
    def row(self) -> Row:
        return METHODS[self.name]

    @property
    def dtype(self) -> torch.dtype:
        return SETTINGS[self.setting][0]

    def autocast(self) -> AbstractContextManager[Any]:
        """The setting's autocast; without one, nothing."""
        dtype = SETTINGS[self.setting][1]
        return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def build(self) -> nn.Module:
        return build(self.family, self.dtype, layers=LAYERS)

    def attach(self, model: nn.Module) -> Any:
        data = batches(2, ROWS, LENGTH) if self.row.probes else None
        return attach(model, self.row.method, budget=self.row.budget, batches=data, seed=1)

    def backward(self, model: nn.Module, batch: Mapping[str, Tensor], items: int) -> None:
        """Accumulate the gradient of the summed loss over `items`."""
        with self.autocast():
            loss = summed_loss(model, batch) / items
        loss.backward()

    def optimizer(self, tuning: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(tuning.parameters(), lr=1e-2, weight_decay=0.01)

    def steps(self, tuning: Any, optimizer: torch.optim.Optimizer, *, first: int = 0, last: int = STEPS) -> None:
        for batch in batches(STEPS, ROWS, LENGTH, seed=1)[first:last]:
            optimizer.zero_grad()
            self.backward(tuning.model, batch, ROWS * LENGTH)
            optimizer.step()


class Trained:
    """A cell after its steps: attached until `finished` is first read."""

    def __init__(self, cell: Cell) -> None:
        self.cell, model = cell, cell.build()
        self.start = named(model)
        with cell.forced():
            self.tuning = cell.attach(model)
            cell.steps(self.tuning, cell.optimizer(self.tuning))
        self.plan, self.logits, self.delta = self.tuning.plan, logits(self.tuning.model), self.tuning.delta()
        self.leaves = {name: leaf.detach().clone() for name, leaf in self.tuning.named_leaves().items()}
        self.attached = {n: p.detach().clone() for n, p in self.tuning.model.named_parameters()}

    @cached_property
    def finished(self) -> nn.Module:
        """The model after `finish()`."""
        return self.tuning.finish()
