"""The probe: one pass over a few batches that collects statistics of gradients and inputs, and changes nothing.

A unit is `rows` rows; every statistic is a mean over units, so the same data give the same plan whatever the batch
size. Each gradient is reduced to block sums and freed as soon as autograd has made it: beside the weights there live
one unit's activations, half of them recomputed in backward, and one matrix's gradient. Dropout is off.

Statistics of inputs (`input_norm`, `weight_times_input`, `input_covariance`) need the forward alone: without others
beside them there is no backward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ThriftyError
from ..core.heap import trim_heap
from ..core.processes import processes, rank, sum_over_processes, together
from ..core.quantized import dequantized
from ..data.units import units
from ..kernels.region_grad import block_sums
from .attribution import ATTRIBUTIONS, attribute
from .entry_sums import ENTRY_GRID, EntrySums
from .input_sums import INPUT_STATISTICS, InputSums, check_inputs
from .inputs import Input, watch_inputs
from .recompute import recomputed_layers
from .sides import SIDES, SideSums, side_sums
from .targets import Target

__all__ = ["INPUT_STATISTICS", "STATISTICS", "Loss", "Probe", "check_inputs", "model_loss", "run_probe"]

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]

# per number: what is summed over each block and over units; g gradient, w weight
STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "abs_grad": lambda g, w: g.abs(),
    "accumulated_grad": lambda g, w: g,
    "signed_grad": lambda g, w: g,
    "squared_grad": lambda g, w: g.square(),
    "weight_times_grad": lambda g, w: (w * g).abs(),
}
_BY_NUMBER = frozenset({"accumulated_grad"})  # summed over units before a block's numbers meet: |sum of g|
_NO_LABEL = "the probe saw no label: batches is empty or every label is -100; check the data and max_length"
_CHUNK = 2**20  # numbers reduced at a time, so that no second tensor of a matrix's size is made


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's own loss."""
    loss = model(**batch).loss
    if loss is None:
        raise ThriftyError("the model returned no loss: give batches with 'labels'")
    return loss


@dataclass
class Probe:
    """Sums of each statistic over `units`: `sums[statistic][parameter]`, float64 `[..., block rows, block columns]`;
    for single numbers on disk. `grids`: the shape of each parameter's blocks. `inputs`: which linear layers among the
    parameters read the same input.

    `attributions[statistic][parameter]`: float32 `[rows with a label, outputs]`; see `attribution.attribute`.
    `sides[parameter]`: of each parameter's type, for the statistic `SIDES`.
    `input_squares[parameter]`, `covariances[parameter]`: of linear layers alone; see `input_sums.InputSums`.
    """

    sums: dict[str, dict[str, Tensor | EntrySums]] = field(default_factory=dict)
    attributions: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    input_squares: dict[str, Tensor] = field(default_factory=dict)
    covariances: dict[str, EntrySums] = field(default_factory=dict)
    sides: dict[str, SideSums] = field(default_factory=dict)
    grids: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    inputs: tuple[Input, ...] = ()
    units: int = 0
    seconds: float = 0.0

    def mean(self, statistic: str, name: str, *, sizes: Tensor) -> Tensor:
        """Mean over units and over the numbers of each block (`sizes` counts them). ThriftyError if it is not
        finite."""
        sums = self.sums[statistic][name]
        if isinstance(sums, EntrySums):
            sums = sums.read() if self.grids[name] == ENTRY_GRID else sums.absolute_blocks(self.grids[name])
        value = sums / (self.units * sizes.to(sums.device))
        return _finite(value.abs(), statistic, name)

    def merge(self, read: InputSums) -> None:
        """Replace all sums by those over all processes, and the number of units; attributions are no sums."""
        if processes() == 1:
            return
        count = torch.tensor([float(self.units)], dtype=torch.float64)
        sum_over_processes(count)
        self.units = round(count.item())
        for found in self.sums.values():
            for sums in found.values():
                if isinstance(sums, EntrySums):
                    sums.merge()
                else:
                    sum_over_processes(sums)
        for side in {id(side): side for side in self.sides.values()}.values():
            side.merge()
        read.merge()

    def of_inputs(self, statistic: str, target: Target, weight: Tensor, *, grid: tuple[int, int]) -> Tensor:
        """Sum over the numbers of each block of a statistic in INPUT_STATISTICS: n or |w| n, where n is the norm over
        all tokens, sqrt(sum x^2), of the input column that the weight w multiplies. ThriftyError if not finite."""
        norms = self.input_squares[target.name].sqrt().to(weight.device)
        wide = (norms[:, None] if target.transposed else norms).expand(weight.shape)
        return _finite(_reduce(wide, dequantized(weight), INPUT_STATISTICS[statistic], grid), statistic, target.name)


def _finite(value: Tensor, statistic: str, name: str) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise ThriftyError(
            f"the probe's {statistic} of {name} is not finite: the loss overflows on this data; "
            "try dtype float32, or look for broken rows"
        )
    return value


@contextmanager
def _only(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Nothing but `names` requires a gradient, dropout is off; restored on leaving, gradients too."""
    parameters = dict(model.named_parameters())
    before = {name: (p.requires_grad, p.grad) for name, p in parameters.items()}
    training = [module for module in model.modules() if module.training]
    chosen = {name: parameters[name] for name in names}
    try:
        model.eval()
        for name, p in parameters.items():
            p.requires_grad_(name in chosen)
            p.grad = None
        yield chosen
    finally:
        for name, p in parameters.items():
            p.requires_grad_(before[name][0])
            p.grad = before[name][1]
        for module in training:
            module.training = True


def _reduce(
    gradient: Tensor, weight: Tensor, statistic: Callable[[Tensor, Tensor], Tensor], grid: tuple[int, int]
) -> Tensor:
    """The statistic summed over each block, float64 `[..., block rows, block columns]`."""
    h, w = grid
    step = max(1, _CHUNK // (h * gradient.shape[-1])) * h
    found = []
    for matrix, values in zip(
        gradient.flatten(0, -3) if gradient.ndim == 3 else [gradient],
        weight.flatten(0, -3) if weight.ndim == 3 else [weight],
        strict=True,
    ):
        for i in range(0, matrix.shape[0], step):
            g, v = matrix[i : i + step], values[i : i + step]
            found.append(block_sums(statistic(g.float() if g.dtype != torch.float64 else g, v), h=h, w=w))
    return torch.cat(found).double().view(*gradient.shape[:-2], -1, found[0].shape[-1])


def _zeros(parameter: Tensor, grid: tuple[int, int], *, statistic: str) -> Tensor | EntrySums:
    shape = parameter.shape
    if grid == ENTRY_GRID or statistic in _BY_NUMBER:
        return EntrySums(shape)
    blocks = (*shape[:-2], -(-shape[-2] // grid[0]), -(-shape[-1] // grid[1]))
    return torch.zeros(blocks, dtype=torch.float64, device=parameter.device)


def _labelled(batches: Iterable[Mapping[str, Any]], *, rows: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """The units that have a label, on `device`."""
    for unit in units(batches, rows=rows):
        labels = unit.get("labels")
        if labels is None:
            raise ThriftyError("the probe needs batches with 'labels' (-100 where there is nothing to learn)")
        if bool((labels != -100).any()):
            yield {k: v.to(device) if isinstance(v, Tensor) else v for k, v in unit.items()}


def _attributions(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], names: Iterable[str], *, joint: bool, rows: int
) -> dict[str, Tensor]:
    """See `attribute`; rows one after the other."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    device = next(model.parameters()).device
    with _only(model, ()), torch.enable_grad():
        for unit in _labelled(batches, rows=rows, device=device):
            for name, values in attribute(model, unit, [*found], joint=joint).items():
                found[name].append(values)
    if not all(found.values()):
        raise ThriftyError(_NO_LABEL)
    return {name: torch.cat(values) for name, values in found.items()}


def run_probe(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    grids: Mapping[str, tuple[int, int]],
    statistics: Iterable[str],
    loss: Loss = model_loss,
    rows: int = 4,
) -> Probe:
    """Collect `statistics` of the parameters in `grids` (name -> block shape) over `batches`.

    Several processes (torch.distributed) share the units out and add their sums up, so each is given the same batches.
    """
    start, probe, wanted = time.perf_counter(), Probe(), sorted(statistics)
    trim_heap()
    if set(wanted) & set(ATTRIBUTIONS):
        (statistic,) = wanted  # a pass of its own: it needs no gradient of a weight
        probe.attributions[statistic] = _attributions(model, batches, grids, joint="joint" in statistic, rows=rows)
        trim_heap()
        probe.seconds = time.perf_counter() - start
        return probe
    device = next(model.parameters()).device
    hooks: list[Any] = []
    others: dict[str, Any] | None = None
    with_sides = SIDES in wanted
    read, wanted = InputSums(model, grids, wanted), [s for s in wanted if s in STATISTICS]
    backward = bool(wanted) or with_sides

    def collect(name: str) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            assert p.grad is not None
            with torch.no_grad():
                values = dequantized(p)
                for statistic in wanted:
                    sums = probe.sums[statistic][name]
                    if isinstance(sums, EntrySums):
                        sums.add(p.grad, values, STATISTICS[statistic])
                    else:
                        sums += _reduce(p.grad, values, STATISTICS[statistic], grids[name])
                if name in probe.sides:
                    probe.sides[name].add(p.grad)
            p.grad = None

        return hook

    parameters = dict(model.named_parameters())
    probe.sides = side_sums({name: parameters[name] for name in grids if with_sides})
    probe.grids = dict(grids)
    probe.sums = {s: {n: _zeros(parameters[n], grid, statistic=s) for n, grid in grids.items()} for s in wanted}
    with (
        together("it looked at its part of the batches"),
        _only(model, grids if backward else ()) as chosen,
        watch_inputs(model, grids) as inputs,
        recomputed_layers(model),
        torch.set_grad_enabled(backward),
    ):
        try:
            hooks = [p.register_post_accumulate_grad_hook(collect(name)) for name, p in chosen.items()]
            for number, moved in enumerate(_labelled(batches, rows=rows, device=device)):
                if number % processes() != rank():
                    others = moved
                    continue
                with read.watch(moved):  # not in backward, where a layer may run again
                    value = loss(model, moved)
                if backward:
                    value.backward()
                probe.units += 1
                del value
                trim_heap()  # units of other lengths would leave holes of other sizes
            if not probe.units and others is not None:  # fewer units than processes
                with torch.no_grad():
                    loss(model, others)  # shows which layers read the same input
        finally:
            for hook in hooks:
                hook.remove()
    probe.merge(read)
    probe.inputs, probe.input_squares, probe.covariances = inputs(), read.squares, read.products
    if probe.units == 0:
        raise ThriftyError(_NO_LABEL)
    seen = any(bool(sums.any()) for found in probe.sums.values() for sums in found.values())
    if backward and not seen and not any(sums.any() for sums in probe.sides.values()):
        raise ThriftyError(
            "the probe's gradients are zero everywhere: no label is predicted (the first of a row never is), "
            "or the loss does not depend on the target modules; check the data and target_modules"
        )
    probe.seconds = time.perf_counter() - start
    return probe
