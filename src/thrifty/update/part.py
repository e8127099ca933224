"""One parameter trained in place: its region, its offset leaf, its original values, and when they are written into `W`.

`W` is the frozen base weight and holds original + offset, rounded once. The leaf is the offset from the original
values, float32 where `W` is of lower precision, so that small updates are not rounded away and weight decay pulls to
the pretrained values. Two triggers write: a global hook after any optimizer's step, and a flag set whenever the leaf
received a gradient, which the next forward clears by writing (optimizers that step elsewhere, offloaded ones). Where
FSDP2 has sharded the model, the optimizer's step alone writes, into the rows that this process holds (`sharded.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..core.region import Blocks, Region, Whole
from ..core.rotated import Basis
from ..delta import LowRankPiece, Piece
from .sharded import HeldRows, copy_whole, is_sharded, refuse_partitioned, whole
from .strips import merge_pending

__all__ = ["LEAF_PREFIX", "InPlaceModule", "Part", "leaf_dtype"]

LEAF_PREFIX = "thrifty_offset_"

# ordered, with weak values: a WeakSet iterates in another order on each rank
_LIVE: dict[int, weakref.ref[Part]] = {}
_count = [0]
_hooked: list[bool] = []


def leaf_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or the weight's own dtype where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    touched = False
    for key in list(_LIVE):  # keys alone: making pairs of them may collect garbage, which drops entries
        reference = _LIVE.get(key)
        part = None if reference is None else reference()
        if part is not None and id(part.leaf) in stepped:
            part.write()
            part.stamp += 1
            touched = True
    if touched:
        merge_pending()


class Part:
    """The in-place training of one parameter (`attribute` of `module`; tied holders share the part)."""

    def __init__(
        self, module: nn.Module, attribute: str, *, name: str, region: Region, keep_original: bool = True
    ) -> None:
        self.module, self.attribute, self.name, self.region = module, attribute, name, region
        weight = self.weight
        self.in_leaf = isinstance(region, Whole) and weight.dtype == leaf_dtype(weight.dtype)
        keep_original = keep_original or not self.in_leaf
        self.original: Tensor | None = region.gather(weight) if keep_original else None
        self.dirty, self.stamp = False, 0
        self.kept: Tensor | None = None  # the trained values, while the base's are in `W`
        self.held: HeldRows | None = None
        if self.in_leaf:  # all of a float32 tensor: the tensor itself is the leaf, nothing has to be written
            weight.requires_grad_(True)
        else:
            shape = region.packed_shape(weight.shape)
            leaf = nn.Parameter(torch.zeros(shape, dtype=leaf_dtype(weight.dtype), device=weight.device))
            module.register_parameter(LEAF_PREFIX + attribute, leaf)
        self.arm()

    @property
    def weight(self) -> Tensor:
        """The frozen base tensor `W`."""
        weight = self.module._parameters[self.attribute]
        assert weight is not None
        return weight

    @property
    def leaf(self) -> nn.Parameter:
        """The only trainable tensor of this part."""
        leaf = self.module._parameters[self.attribute if self.in_leaf else LEAF_PREFIX + self.attribute]
        assert leaf is not None
        return leaf

    @property
    def gathers(self) -> Region | Basis:
        """Whose `gather` makes the leaf's gradient of the dense one of `W`."""
        return self.region

    def moved(self) -> bool:
        """Has the offset left zero?"""
        return bool(whole(self.leaf.detach()).any())

    def _take(self) -> Tensor:
        """The region's values in `W`, packed."""
        return self.region.gather(whole(self.weight.detach()))

    def _put(self, values: Tensor) -> None:
        """Packed `values` into `W`."""
        refuse_partitioned(self.weight)
        weight = self.weight.data
        if not is_sharded(weight):
            self.region.scatter_(weight, values)
            return
        self.held = self.held or HeldRows(self.region, weight)
        self.held.scatter_(weight, values)

    def arm(self) -> None:
        """Set the triggers; again after a deep copy, which drops them."""
        _count[0] += 1
        key = _count[0]
        _LIVE[key] = weakref.ref(self, lambda _: _LIVE.pop(key, None))
        if not _hooked:
            _hooked.append(True)
            register_optimizer_step_post_hook(_after_step)
        if isinstance(self.region, Blocks) and self.leaf.ndim == 1:  # for an optimizer that moves matrices
            groups = self.region.groups(self.weight.shape)
            self.leaf.block_sizes = [(len(group.rows), group.h, group.w) for group in groups]  # type: ignore[attr-defined]
        if not self.in_leaf:
            self._handle = self.leaf.register_post_accumulate_grad_hook(_mark_dirty(weakref.ref(self)))

    def disarm(self) -> None:
        """Take the triggers away."""
        for key in list(_LIVE):
            reference = _LIVE.get(key)
            if reference is not None and reference() is self:
                del _LIVE[key]
        if not self.in_leaf:
            self._handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_handle"}

    def values(self) -> Tensor:
        """original + offset, packed, rounded once to the dtype of `W`."""
        if self.in_leaf:
            return whole(self.leaf.detach()).clone()
        assert self.original is not None
        offset = whole(self.leaf.detach())
        return (self.original.to(offset.dtype).view_as(offset) + offset).to(self.weight.dtype)

    def write(self) -> None:
        """Write the trained values into `W`, through `.data`: autograd keeps `W` of graphs that are still alive."""
        self.dirty = self.kept is not None  # while the base is in `W`, what a step changed is written when it goes
        if not self.in_leaf and not self.dirty:
            self._put(self.values())

    def flush(self) -> None:
        """Write if a step may have gone unseen. Unconditional on the values: comparing them would wait for a GPU."""
        if self.dirty:
            self.write()

    def swap_in(self, values: Tensor) -> None:
        """Put `values` into `W` in place of the trained ones, until `swap_out`."""
        self.flush()
        self.kept = self._take()
        self._put(values)

    def swap_out(self) -> None:
        """Put the trained values back."""
        assert self.kept is not None
        self._put(self.kept)
        self.kept = None
        self.flush()

    @torch.no_grad()
    def load(self, values: Tensor) -> None:
        """Copy into the leaf in place (an optimizer holds the object) and write `W`."""
        copy_whole(values, self.leaf)
        self.write()
        self.stamp += 1

    def finish(self) -> None:
        """Leave the trained values in `W` for good."""
        self.write()
        self.disarm()

    def piece(self, original: Tensor) -> Piece | LowRankPiece:
        """What changed, against the `original` values."""
        self.flush()
        trained = whole(self.weight.detach())
        base = trained.clone()
        self.region.scatter_(base, original)
        return Piece.of(base, trained, self.region)

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """The module was moved or cast by `fn`: what is kept beside its parameters goes along."""
        if self.original is not None:
            self.original = fn(self.original)

    @torch.no_grad()
    def adopt_weight(self) -> None:
        """`W` was loaded from outside: the offset becomes what `W` holds above the original values."""
        if not self.in_leaf:
            assert self.original is not None
            loaded, original = (x.to(self.leaf.dtype).view(self.leaf.shape) for x in (self._take(), self.original))
            copy_whole(loaded - original, self.leaf)
        self.dirty = False
        self.stamp += 1


def _mark_dirty(reference: weakref.ref[Part]) -> Callable[[Tensor], None]:
    def hook(_: Tensor) -> None:
        part = reference()
        if part is not None:
            part.dirty = True

    return hook


class InPlaceModule(nn.Module):
    """Mixed into the class of a module whose parameters are trained in place: keys and dtypes stay those of the
    base."""

    _thrifty: dict[str, Part]  # attribute -> part

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for part in self._thrifty.values():
            if part.module is self:
                part.arm()

    def _leaves(self) -> dict[str, nn.Parameter | None]:
        return {k: p for k, p in self._parameters.items() if k.startswith(LEAF_PREFIX)}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for part in self._thrifty.values():
            part.flush()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key in self._leaves():
            destination.pop(prefix + key, None)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        leaves = self._leaves()
        for key in leaves:
            del self._parameters[key]
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            self._parameters.update(leaves)
        for key, part in self._thrifty.items():
            if prefix + key in state_dict:  # under this holder's own name: a tied tensor may come under any of them
                part.adopt_weight()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InPlaceModule:
        before = {key: (leaf, leaf.detach().clone()) for key, leaf in self._leaves().items() if leaf is not None}
        super()._apply(fn, recurse)
        for key, (leaf, values) in before.items():  # .to(bfloat16) must not round the float32 leaf
            now, weight = self._parameters[key], self._parameters[key.removeprefix(LEAF_PREFIX)]
            assert now is not None
            assert weight is not None
            if now.dtype != leaf_dtype(weight.dtype):
                now.data = values.to(now.device)
            if leaf.grad is not None and now.grad is not None and now.grad.dtype != now.dtype:
                now.grad = None
        for part in self._thrifty.values():
            if part.module is self:
                part.convert(fn)
        return self
