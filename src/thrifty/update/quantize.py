"""Quantizing a model's linear layers through torchao, putting deltas on them, and making a plain model again."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from ..core.errors import ThriftyError, unknown
from ..core.heap import trim_heap
from ..core.quantized import QuantizedLinear, dequantized, give_gradients, quantized_as
from ..core.region import Blocks
from ..delta import Delta, Piece
from ..delta.digest import fingerprint
from ..delta.files import AnyPiece
from ..delta.peer import PeerDelta, merge
from .quantized import Patch, PatchedLinear, prepared

__all__ = ["FORMS", "apply_quantized", "check_quantize", "packed_bytes", "plain", "quantize"]

FORMS = ("int8", "int4", "nf4")
_BLOCK = 64  # numbers that share a scale in NF4
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_log = logging.getLogger("thrifty")


def quantize(model: nn.Module, form: str, *, device: torch.device | str | None = None) -> int:
    """Quantize the weight of every linear layer in place, but for the output head and tied weights; returns how many.

    Forms: `int8`, symmetric, one scale for each output; `int4`, groups of 64 (or 32) inputs with a scale and a zero of
    their own; `nf4`, QLoRA's 4-bit NormalFloat, blocks of 64 with 8-bit scales. A layer whose sides do not fit the
    groups stays as it is. The weights' fingerprints are kept, so that their values are known again when blocks of them
    are trained. device: where to put the model, matrix by matrix, so that it is never there as a whole. ThriftyError:
    torchao is missing, no layer fits, or the dtype does not.
    """
    fitting = check_quantize(model, form)
    makers = _makers()
    for module in fitting:
        weight = module.weight.detach()
        base = fingerprint(weight)
        module.weight = nn.Parameter(makers[form](weight if device is None else weight.to(device)), requires_grad=False)
        module.__class__ = QuantizedLinear
        module.base_sha256, module.form = base, form  # type: ignore[assignment]
        del weight
    if device is not None:
        model.to(device)
    trim_heap()
    return len(fitting)


def check_quantize(model: nn.Module, form: str) -> list[nn.Linear]:
    """The layers that `quantize` would quantize, also of a model without values. ThriftyError as it would raise."""
    if form not in FORMS:
        raise ThriftyError(unknown("quantize", str(form), FORMS))
    if find_spec("torchao") is None:
        raise ThriftyError("quantize needs torchao: pip install 'thrifty[quantized]', or leave quantize out")
    name, linears = type(model).__name__, _linears(model)
    if not linears:
        raise ThriftyError(
            f"quantize: {name} has no torch.nn.Linear beside its head, and torchao quantizes no other layer (GPT-2's "
            "Conv1D is none): leave quantize out"
        )
    if form == "int8" and any(module.weight.dtype not in _DTYPES for module in linears):
        raise ThriftyError("quantize: int8 is made of float32, bfloat16 or float16: set dtype")
    fitting = [module for module in linears if _fits(form, module)]
    if not fitting:
        raise ThriftyError(
            f"quantize: no linear layer of {name} fits {form}, whose groups are of 32 or 64 inputs: take int8"
        )
    if len(fitting) < len(linears):
        _log.warning("%d of %d linear layers do not fit %s and stay", len(linears) - len(fitting), len(linears), form)
    return fitting


def packed_bytes(module: nn.Linear, form: str) -> int:
    """What the weight of `module` will hold once it is quantized."""
    rows, columns = module.weight.shape
    numbers, size = rows * columns, module.weight.element_size()
    if form == "int8":
        return numbers + rows * 5  # a float32 scale and an int8 zero of each output
    if form == "int4":
        return numbers // 2 + 2 * size * numbers // _group(columns)
    blocks = numbers // _BLOCK
    return numbers // 2 + blocks + size * (blocks // math.gcd(blocks, 256) + 17)  # the table of 16, the scales' mean


def _linears(model: nn.Module) -> list[nn.Linear]:
    """Linear layers whose weight nothing else reads."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return [
        module
        for module in model.modules()
        if type(module) is nn.Linear and module is not head and holders[id(module.weight)] == 1
    ]


def _group(columns: int) -> int:
    """Inputs of a group of int4; 0 where none fits."""
    return next((size for size in (64, 32) if columns % size == 0), 0)


def _fits(form: str, module: nn.Linear) -> bool:
    rows, columns = module.weight.shape
    if form == "int4":
        return _group(columns) > 0
    return form == "int8" or rows * columns % _BLOCK == 0


def _makers() -> Mapping[str, Callable[[Tensor], Tensor]]:
    """Form -> what makes a quantized tensor of a weight that fits."""
    with _quiet():
        from torchao.quantization import Int8Tensor, to_nf4
        from torchao.quantization.granularity import PerRow

    def nf4(weight: Tensor) -> Tensor:
        made: Tensor = to_nf4(weight.contiguous(), _BLOCK, math.gcd(weight.numel() // _BLOCK, 256))
        return made

    return {"int8": lambda weight: Int8Tensor.from_hp(weight, PerRow()), "int4": _int4, "nf4": nf4}


@contextmanager
def _quiet() -> Iterator[None]:
    """While torchao is imported: it warns of each CUDA library that does not load on a CPU."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _int4(weight: Tensor) -> Tensor:
    """torchao's `Int4Tensor`, which torchao itself makes on CUDA alone: 16 values from the least to the largest number
    of each group, to the nearest of which each is rounded."""
    from torchao.quantization import Int4Tensor

    rows, columns = weight.shape
    group = _group(columns)
    values = weight.reshape(rows, -1, group)
    least = values.amin(-1)
    scale = ((values.amax(-1) - least) / 15).clamp_min(torch.finfo(weight.dtype).tiny)
    zero = least + 8 * scale
    codes = ((values - zero[:, :, None]) / scale[:, :, None]).round_().clamp_(-8, 7).to(torch.int8).view(rows, -1, 2)
    packed = (codes[:, :, 0] & 15) | (codes[:, :, 1] << 4)
    scale, zero = scale.t().contiguous(), zero.t().contiguous()
    made: Tensor = Int4Tensor(packed, scale, zero, block_size=[1, group], shape=weight.shape)
    return made


@torch.no_grad()
def plain(model: nn.Module) -> nn.Module:
    """Give every quantized layer of `model` the values that it stands for, trained blocks in them, as plain `nn.Linear`
    in place: what transformers alone loads. Its logits are the quantized model's within rounding."""
    for module in give_gradients(model).values():
        weight = dequantized(module.weight)
        if isinstance(module, PatchedLinear):
            module.patch.region.scatter_(weight, module.patch.values)
            del module.patch
        for key in ("base_sha256", "form"):
            module.__dict__.pop(key, None)
        module.weight = nn.Parameter(weight, requires_grad=False)
        module.__class__ = nn.Linear  # type: ignore[assignment]
    return model


@torch.no_grad()
def apply_quantized(delta: Delta, model: nn.Module, *, as_plain: bool = False) -> nn.Module:
    """Put `delta` on the quantized base that it was trained on, and return the model to use: its blocks beside the
    quantized weights, all else as `Delta.apply` does; a PEFT adapter stays one. `as_plain`: a plain model, dequantized,
    with the blocks or the merged adapter in its weights. ThriftyError where it does not fit."""
    layers = prepared(model)
    was, now = delta.info.get("quantize"), quantized_as(model)
    if was is not None and was != now:
        raise ThriftyError(f"the delta was trained on a base quantized to {was}, this one is {now}: quantize={was}")
    if isinstance(delta, PeerDelta):
        _check_adapter(delta, model, layers)
        wrapped: nn.Module = delta.wrap(plain(model) if as_plain else model)
        return merge(wrapped)[0] if as_plain else wrapped
    pieces = {name: piece for name, piece in delta.pieces.items() if name in layers}
    for name, piece in pieces.items():
        _check_piece(name, piece, layers[name])
    replace(delta, pieces={n: p for n, p in delta.pieces.items() if n not in layers}).apply(model)
    for name, piece in pieces.items():
        layer = layers[name]
        assert isinstance(piece, Piece)
        assert isinstance(piece.region, Blocks)
        quantized = piece.region.gather(dequantized(layer.weight))
        layer.__class__ = PatchedLinear
        values = piece.values.to(layer.weight.device)
        layer.patch = Patch(piece.region, piece.shape, values=values, quantized=quantized)
    return plain(model) if as_plain else model


def _check_adapter(delta: PeerDelta, model: nn.Module, layers: Mapping[str, QuantizedLinear]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, expected in delta.base.items():
        known = layers[name].base_sha256 or expected if name in layers else None
        if name not in parameters or (known or fingerprint(parameters[name])) != expected:
            raise ThriftyError(f"{name} differs from the base of this delta: another base, or a changed one")


def _check_piece(name: str, piece: AnyPiece, layer: QuantizedLinear) -> None:
    weight = layer.weight
    if not isinstance(piece, Piece) or not isinstance(piece.region, Blocks):
        raise ThriftyError(f"{name} is quantized, and the delta holds more of it than blocks: leave quantize out")
    if tuple(weight.shape) != piece.shape or weight.dtype != piece.dtype:
        raise ThriftyError(
            f"{name} is {weight.dtype} {tuple(weight.shape)}, the delta is of {piece.dtype} {piece.shape}: another base"
        )
    if layer.base_sha256 not in (None, piece.fingerprint):
        raise ThriftyError(f"{name} was quantized from another base than this delta's")
