"""What linear layers read, summed while the probe runs: squares of each input column, products of every two.

Both are plain sums over tokens, so those of several processes add up. Tokens that the attention mask leaves out do not
count, where a layer reads one vector for each token of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ThriftyError
from ..core.processes import sum_over_processes
from .entry_sums import EntrySums
from .inputs import strip_linears

__all__ = ["COVARIANCE", "INPUT_STATISTICS", "InputSums", "check_inputs"]

COVARIANCE = "input_covariance"
# of each weight w, with n the norm of the input column that it multiplies
INPUT_STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "input_norm": lambda n, w: n,
    "weight_times_input": lambda n, w: n * w.abs(),
}
_CHUNK = 2**20  # numbers made at a time


def check_inputs(model: nn.Module, names: Iterable[str]) -> None:
    """ThriftyError where one of the parameters `names` is not the weight of one linear layer alone."""
    known, names = strip_linears(model, names), list(names)
    missing = [name for name in names if name not in known]
    if missing:
        raise ThriftyError(
            f"what {missing[0]} reads is not seen: only linear layers other than the output head have input "
            "statistics, not stacked experts, tied weights or embeddings; leave it out of target_modules"
        )


class InputSums:
    """Of those of the parameters `names` that `check_inputs` lets pass; `wanted` says which sums.

    squares: `[inputs]`, the sum of x^2 over tokens, float64, on the layer's device. products: `[inputs, inputs]`, the
    sum of x^T x over tokens, not centred, float32, in a temporary file; made in strips of rows, so that the whole is
    never in memory. Layers that read the same input have the same sums: ask for one of them.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], wanted: Collection[str]) -> None:
        self.wanted = set(wanted) & {*INPUT_STATISTICS, COVARIANCE}
        self.squares: dict[str, Tensor] = {}
        self.products: dict[str, EntrySums] = {}
        self._linears = strip_linears(model, names) if self.wanted else {}
        self._mask: Tensor | None = None
        for name, (module, target) in self._linears.items():
            columns = target.out_in[1]
            if self.wanted & set(INPUT_STATISTICS):
                device = next(module.parameters()).device
                self.squares[name] = torch.zeros(columns, dtype=torch.float64, device=device)
            if COVARIANCE in self.wanted:
                self.products[name] = EntrySums((columns, columns))

    @contextmanager
    def watch(self, unit: Mapping[str, Any]) -> Iterator[None]:
        """While open, forwards, which are of `unit`, add to the sums."""
        mask = unit.get("attention_mask")
        self._mask = None if mask is None else mask.reshape(-1).bool()
        hooks = [
            module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, (module, _) in self._linears.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def merge(self) -> None:
        """Replace the sums by those over all processes."""
        for squares in self.squares.values():
            sum_over_processes(squares)
        for products in self.products.values():
            products.merge()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            self._add(name, x.detach().reshape(-1, x.shape[-1]))

        return hook

    @torch.no_grad()
    def _add(self, name: str, x_TI: Tensor) -> None:
        if self._mask is not None and len(self._mask) == len(x_TI):
            x_TI = x_TI[self._mask.to(x_TI.device)]
        step = max(1, _CHUNK // x_TI.shape[1])
        if name in self.squares:
            for start in range(0, len(x_TI), step):
                self.squares[name] += x_TI[start : start + step].double().square().sum(0)
        if name in self.products:
            x_TI = x_TI.float()
            for start in range(0, x_TI.shape[1], step):
                with torch.autocast(x_TI.device.type, enabled=False):  # the forward around it may be in bfloat16
                    rows = x_TI[:, start : start + step].mT @ x_TI
                self.products[name].add_at(start * x_TI.shape[1], rows.flatten().cpu())
