"""Quantizing a model's linear layers through torchao, and making a plain model of it again."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ThriftyError, unknown
from ..core.quantized import QuantizedLinear, dequantized, give_gradients
from ..delta.digest import fingerprint
from .quantized import PatchedLinear

__all__ = ["FORMS", "plain", "quantize"]

FORMS = ("int8", "int4", "nf4")
_BLOCK = 64  # numbers that share a scale in NF4
_log = logging.getLogger("thrifty")


def quantize(model: nn.Module, form: str) -> int:
    """Quantize the weight of every linear layer in place, but for the output head and tied weights; returns how many.

    Forms: `int8`, symmetric, one scale for each output; `int4`, groups of 64 (or 32) inputs with a scale and a zero of
    their own; `nf4`, QLoRA's 4-bit NormalFloat, blocks of 64 with 8-bit scales. A layer whose sides do not fit the
    groups stays as it is. Fingerprints of the weights are kept, so that their values are known again when blocks of
    them are trained. ThriftyError: torchao is missing, no layer fits, or the dtype does not.
    """
    makers = _makers()
    if form not in makers:
        raise ThriftyError(unknown("quantize", str(form), makers))
    linears = _linears(model)
    if not linears:
        raise ThriftyError(
            f"quantize: {type(model).__name__} has no torch.nn.Linear beside its head, and torchao quantizes no other "
            "layer (GPT-2's Conv1D is none): leave quantize out"
        )
    dtypes = {module.weight.dtype for module in linears.values()}
    if not dtypes <= {torch.float32, torch.bfloat16, torch.float16} and form != "nf4":
        raise ThriftyError(f"quantize: {form} is made of float32, bfloat16 or float16, not {dtypes}: set dtype")
    done = 0
    for module in linears.values():
        weight = makers[form](module.weight.detach())
        if weight is not None:
            base = fingerprint(module.weight)
            module.weight = nn.Parameter(weight, requires_grad=False)
            module.__class__ = QuantizedLinear
            module.base_sha256 = base  # type: ignore[assignment]
            done += 1
    if not done:
        raise ThriftyError(
            f"quantize: no linear layer of {type(model).__name__} fits {form}, whose groups are of 32 or 64 inputs "
            "(and 16 outputs for int4): take int8"
        )
    if done < len(linears):
        _log.warning("%d of %d linear layers do not fit the groups of %s and stay", len(linears) - done, done, form)
    return done


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers whose weight nothing else reads."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and holders[id(module.weight)] == 1
    }


def _makers() -> Mapping[str, Callable[[Tensor], Tensor | None]]:
    """Form -> what makes a quantized tensor of a weight, None where its sides do not fit."""
    try:
        from torchao.quantization import Int8Tensor, to_nf4
        from torchao.quantization.granularity import PerRow
    except ImportError:
        raise ThriftyError("quantize needs torchao: pip install 'thrifty[quantized]', or leave quantize out") from None

    def nf4(weight: Tensor) -> Tensor | None:
        blocks, rest = divmod(weight.numel(), _BLOCK)
        if rest:
            return None
        made: Tensor = to_nf4(weight.contiguous(), _BLOCK, math.gcd(blocks, 256))
        return made

    return {"int8": lambda weight: Int8Tensor.from_hp(weight, PerRow()), "int4": _int4, "nf4": nf4}


def _int4(weight: Tensor) -> Tensor | None:
    """In the form of the kernel of the weight's device."""
    rows, columns = weight.shape
    group = next((size for size in (64, 32) if columns % size == 0), None)
    if group is None or rows % 16:
        return None
    kind: Any
    if weight.device.type == "cpu":
        from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor as kind
    else:
        from torchao.quantization import Int4TilePackedTo4dTensor as kind
    made: Tensor = kind.from_hp(weight, [1, group])
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
        module.__dict__.pop("base_sha256", None)
        module.weight = nn.Parameter(weight, requires_grad=False)
        module.__class__ = nn.Linear  # type: ignore[assignment]
    return model
