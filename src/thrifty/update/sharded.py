"""Weights of which each process holds some rows (FSDP2): reading them whole, writing trained values where they lie.

The leaf is sharded like any parameter. After a step it is gathered, and each process writes the values that fall into
its own rows of `W`. All processes read and write together, in the order of the plan. A forward without a backward
leaves the root's weights gathered: `let_go` comes before whatever reads or writes them from outside.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from typing_extensions import TypeIs

from ..core.errors import ThriftyError
from ..core.region import Region

__all__ = ["HeldRows", "copy_whole", "cut_as", "is_sharded", "let_go", "refuse_partitioned", "refuse_sharded", "whole"]


def is_sharded(tensor: Tensor) -> TypeIs[DTensor]:
    """Does each process hold a part of `tensor`?"""
    return isinstance(tensor, DTensor)


def refuse_sharded(tensor: Tensor, what: str) -> None:
    """ThriftyError where `tensor` is sharded, which `what` cannot be."""
    if is_sharded(tensor):
        raise ThriftyError(f"{what} cannot be trained on a sharded model (FSDP2): train with DDP, or in one process")


def refuse_partitioned(weight: Tensor) -> None:
    """ThriftyError where DeepSpeed's ZeRO-3 holds `weight`: what is written into it is lost with the gathered copy."""
    if hasattr(weight, "ds_tensor"):
        raise ThriftyError("DeepSpeed's ZeRO-3 cannot train in place: take ZeRO-2, or FSDP2 (fully_shard)")


def whole(tensor: Tensor) -> Tensor:
    """`tensor`, of a sharded one all of it: then all processes call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def let_go(model: nn.Module) -> None:
    """Give up weights that a forward gathered: the parameters of `model` are those that its optimizer holds again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def cut_as(values: Tensor, leaf: Tensor) -> Tensor:
    """`values`, which every process has whole, sharded as `leaf` is; as they are where their shape is another one."""
    if not isinstance(leaf, DTensor) or values.shape != leaf.shape:
        return values
    return distribute_tensor(values.to(leaf.device), leaf.device_mesh, leaf.placements, src_data_rank=None)


def _rows(tensor: DTensor) -> tuple[int, int]:
    """The rows of a sharded tensor that lie here: the first, and how many."""
    if any(not isinstance(p, Shard) or p.dim != 0 for p in tensor.placements if not p.is_replicate()):
        raise ThriftyError(
            f"a weight is cut as {tensor.placements}, and only rows are known: let FSDP2 (fully_shard) cut the first "
            "dimension, its default"
        )
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0] if shape[0] else 0, shape[0]


def copy_whole(values: Tensor, into: Tensor) -> None:
    """Copy `values`, which every process has whole, into a tensor, of a sharded one into the rows that lie here."""
    if not isinstance(into, DTensor):
        into.copy_(values)
        return
    start, rows = _rows(into)
    into.to_local().copy_(values[start : start + rows])


class HeldRows:
    """Which numbers of a region lie in this process's rows of a sharded weight: `place` in those rows made flat,
    `source` in the packed values made flat, int64."""

    def __init__(self, region: Region, weight: DTensor) -> None:
        shape = region.packed_shape(weight.shape)
        positions = torch.full(tuple(weight.shape), -1, dtype=torch.int64)  # as large as the matrix, once
        region.scatter_(positions, torch.arange(math.prod(shape)).view(shape))
        start, rows = _rows(weight)
        mine = positions[start : start + rows].reshape(-1)
        device = weight.to_local().device
        self.place = (mine >= 0).nonzero()[:, 0].to(device)
        self.source = mine[mine >= 0].to(device)

    def scatter_(self, weight: DTensor, values: Tensor) -> None:
        """Write packed `values`, which every process has whole, into the rows of `weight` that lie here."""
        weight.to_local().view(-1)[self.place] = values.reshape(-1)[self.source].to(weight.dtype)
