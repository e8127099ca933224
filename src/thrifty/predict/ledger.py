"""What one step allocates and computes, seen operation by operation on tensors without values."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from .heap import MAPPED_BYTES

__all__ = ["Ledger", "Segment"]

Segment = tuple[str, int]  # ("forward", layer), ("loss", 0), ("head", 0), ("backward", layer)

_aten = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default: 4,  # two products, 2 FLOPs each
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 10,  # five: the scores once more
}
_FIRST_QUERY = {4: 0, 10: 1}  # where the query stands among the arguments


class _Block:
    """One storage: its bytes, and what they are for."""

    __slots__ = ("bytes", "kind", "number")

    def __init__(self, size: int, kind: str, number: int = -1) -> None:
        self.bytes, self.kind, self.number = size, kind, number


class Ledger(TorchDispatchMode):
    """Counts while it is entered. Bytes: what lives, by kind, and its maximum within each segment. Work, by sort:
    `products.<dtype>` and `attention.<dtype>` in FLOPs, `bytes` read and written by all other operations, `calls`, and
    `mapped`: bytes of blocks so large that a processor's allocator asks the system for fresh pages each time.

    Storages of `held` tensors (weights) are not counted. `labels`: how many rows `nonzero` finds, which the values
    would decide.
    """

    def __init__(self, held: list[Tensor], *, labels: int) -> None:
        super().__init__()
        self.labels = labels
        self.segment: Segment = ("start", 0)
        self.kind = "activations"
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peaks: dict[Segment, tuple[int, dict[str, int]]] = {}
        self.work: dict[Segment, Counter[str]] = {}
        self.events: list[tuple[Segment, int, int]] = []  # segment, block, bytes; 0 bytes: freed
        self._blocks: Any = WeakIdKeyDictionary()
        for tensor in held:
            self._blocks[tensor.untyped_storage()] = _Block(0, "weights")

    def enter(self, segment: Segment, *, kind: str | None = None) -> None:
        """From here on operations belong to `segment`, and what they make to `kind`."""
        self.segment, self.kind = segment, kind or self.kind
        self._high()

    def mark(self, tensor: Tensor | None, kind: str) -> None:
        """`tensor` is of `kind` (a gradient that stays)."""
        block = None if tensor is None else self._blocks.get(tensor.untyped_storage())
        if block is not None and block.kind != "weights":
            self.live[block.kind] -= block.bytes
            block.kind = kind
            self.live[kind] += block.bytes

    def add(self, sort: str, amount: float) -> None:
        """Work of the current segment."""
        self.work.setdefault(self.segment, Counter())[sort] += amount  # type: ignore[assignment]

    def _high(self) -> None:
        if self.total >= self.peaks.get(self.segment, (-1, {}))[0]:
            self.peaks[self.segment] = (self.total, dict(self.live))

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._blocks:
            return
        block = _Block(storage.nbytes(), self.kind, len(self.events))
        self._blocks[storage] = block
        if block.bytes:
            self.events.append((self.segment, block.number, block.bytes))
            self.add("mapped", block.bytes if block.bytes >= MAPPED_BYTES else 0)
        self.live[block.kind] += block.bytes
        self.total += block.bytes
        weakref.finalize(storage, self._freed, block).atexit = False
        self._high()

    def _added(self, inputs: list[Tensor], out: Tensor) -> None:
        """Autograd sums two gradients in the memory of the first, but not where tensors have no values."""
        first = self._blocks.get(inputs[0].untyped_storage())
        alike = all(t.shape == out.shape and t.dtype == out.dtype for t in inputs) and len(inputs) == 2
        storage = out.untyped_storage()
        if alike and first is not None and first.kind == "working" and first.bytes == storage.nbytes():
            block = _Block(first.bytes, first.kind, first.number)
            first.bytes = 0
            self._blocks[storage] = block
            weakref.finalize(storage, self._freed, block).atexit = False

    def _freed(self, block: _Block) -> None:
        self.live[block.kind] -= block.bytes
        self.total -= block.bytes
        if block.bytes:
            self.events.append((self.segment, block.number, 0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten.nonzero.default:
            out = args[0].new_empty((self.labels, args[0].ndim), dtype=torch.int64)
        elif func is _aten._grouped_mm.default:
            out = _grouped(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self._count(func, args, kwargs, inputs, outputs, out)
        if func is _aten.add.Tensor and self.kind == "working":
            self._added(inputs, outputs[0])
        for tensor in outputs:
            self._made(tensor)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor], out: Any) -> None:
        if func in _ATTENTION:
            factor = _ATTENTION[func]
            query, key = args[_FIRST_QUERY[factor] : _FIRST_QUERY[factor] + 2]
            self.add(f"attention.{_name(query)}", factor * query.numel() * key.shape[-2])
        elif func is _aten._grouped_mm.default:
            a, b = args[:2]
            self.add(f"products.{_name(a)}", 2 * a.numel() * b.shape[-1])
        elif func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            self.add(f"products.{_name(inputs[-1])}", flops)
        elif not _is_view(func, inputs, outputs):
            self.add("bytes", sum(_read(t) for t in inputs) + sum(_read(t) for t in outputs))
            self.add("calls", 1)
            return
        else:
            return
        self.add("calls", 1)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _read(tensor: Tensor) -> int:
    """Bytes that an element-wise pass over `tensor` moves: an expanded one is read once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0 or size == 1]
    return math.prod(sizes) * tensor.element_size()


def _is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Does `func` make no number: all its results lie in storages of its inputs, and it writes none?"""
    if func._schema.is_mutable or not outputs:
        return not func._schema.is_mutable
    known = {id(t.untyped_storage()) for t in inputs}
    return all(id(t.untyped_storage()) in known for t in outputs)


def _grouped(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """The shape that `_grouped_mm` gives, whose own shape rule takes bfloat16 alone."""
    if a.ndim == b.ndim == 2:
        assert offs is not None
        return a.new_empty((offs.shape[0], a.shape[0], b.shape[1]))
    if a.ndim == 2:
        return a.new_empty((a.shape[0], b.shape[-1]))
    return a.new_empty((a.shape[1], b.shape[-1]))
