"""Optimizer states under DeepSpeed's ZeRO, whole: what a checkpoint holds.

ZeRO flattens the trained values of a group and gives each process a part of them, a float32 copy and the optimizer's
state. A checkpoint holds them under the leaves' names, so that a run goes on in any number of processes, with DeepSpeed
or without.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["take_over", "uncut"]


def uncut(optimizer: Any) -> Any:
    """A trainer's `optimizer` as it would be without ZeRO's partitions; where it has none, itself."""
    zero = getattr(optimizer, "optimizer", None)
    return _Whole(zero) if hasattr(zero, "bit16_groups") else optimizer


def take_over(leaves: list[nn.Parameter]) -> None:
    """Values that were loaded into the leaves go into ZeRO's own copies of them."""
    from deepspeed.utils import safe_set_full_fp32_param  # an extra

    for leaf in leaves:
        safe_set_full_fp32_param(leaf, leaf.detach())


class _Whole:
    """ZeRO's optimizer (stages 1 and 2) as if it had never been cut: states in the shapes of their parameters."""

    def __init__(self, zero: Any) -> None:
        self.zero, self.optimizer = zero, zero.optimizer
        self._flat: list[Tensor] = [group["params"][0] for group in self.optimizer.param_groups]  # this process's part

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's own, each with the whole parameters."""
        pairs = zip(self.optimizer.param_groups, self.zero.bit16_groups, strict=True)
        return [{**group, "params": parameters} for group, parameters in pairs]

    def state_dict(self) -> dict[str, Any]:
        """As torch's. All processes call it."""
        from deepspeed.utils import safe_get_full_optimizer_state  # an extra

        self._link()
        groups, state = [], dict[int, dict[str, Any]]()
        for group, flat in zip(self.param_groups, self._flat, strict=True):
            first = sum(len(done["params"]) for done in groups)
            for number, parameter in enumerate(group["params"], first):
                kept = self.optimizer.state.get(flat, {})
                state[number] = {
                    key: safe_get_full_optimizer_state(parameter, key) if _like(value, flat) else deepcopy(value)
                    for key, value in kept.items()
                }
            groups.append({**group, "params": list(range(first, first + len(group["params"])))})
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned, here or in any number of processes."""
        parts = {}
        for number, (group, flat) in enumerate(zip(self.param_groups, self._flat, strict=True)):
            saved = [state["state"].get(at, {}) for at in state["param_groups"][number]["params"]]
            pairs = list(zip(group["params"], saved, strict=True))
            keys = saved[0].items()
            parts[number] = {
                key: _part([(p, entry[key]) for p, entry in pairs], flat) if _like(value, group["params"][0]) else value
                for key, value in keys
            }
        groups = [{**group, "params": [number]} for number, group in enumerate(state["param_groups"])]
        self.optimizer.load_state_dict({"state": parts, "param_groups": groups})
        self._link()

    def _link(self) -> None:
        """Tell the parameters where their states lie: DeepSpeed does so after the first group's first step alone."""
        for group, flat in zip(self.param_groups, self._flat, strict=True):
            for parameter in group["params"]:
                if parameter._hp_mapping is not None:
                    parameter._hp_mapping.set_optim_state_fragment(flat, self.optimizer.state[flat])


def _like(value: Any, tensor: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == tensor.shape


def _part(pairs: list[tuple[nn.Parameter, Tensor]], flat: Tensor) -> Tensor:
    """This process's part of whole values, as ZeRO has laid it out."""
    part = torch.zeros_like(flat)
    for parameter, value in pairs:
        if (mapping := parameter._hp_mapping) is not None:
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            part[here.start : here.start + here.numel] = value.flatten()[there.start : there.start + there.numel]
    return part
