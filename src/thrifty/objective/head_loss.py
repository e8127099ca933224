"""The loss of a plain head: thrifty's chunks, or Liger's fused Triton kernel on a CUDA device where it is installed.

Liger: Hsu et al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training"; `pip install liger-kernel`, read at
0.8.5, where it equals `label_loss` in Triton's interpreter. It was never run on a GPU here: no timing of it, and no
16-bit result, has been seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from thrifty.kernels.label_loss import IGNORED, label_loss

__all__ = ["head_loss"]

_DEVICES = ("cuda",)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def head_loss(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """`label_loss`, by the kernel that suits the device: the same sum over labels other than -100, the same gradients.

    Liger is taken on CUDA for float32, bfloat16 and float16. Not where the head is trained over hidden states that ask
    for no gradient: Liger makes the head's gradient only beside theirs, and would leave it out without a word.
    """
    asked = hidden_TD.requires_grad or not (weight_VD.requires_grad or (bias is not None and bias.requires_grad))
    fits = hidden_TD.device.type in _DEVICES and _computed(hidden_TD) in _DTYPES
    fused = _liger() if fits and (asked or not torch.is_grad_enabled()) else None
    if fused is None:
        return label_loss(hidden_TD, weight_VD, labels_T, bias=bias)
    return _fused(fused, hidden_TD, weight_VD, labels_T, bias)


def _fused(
    fused: Callable[..., Tensor], hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, bias: Tensor | None
) -> Tensor:
    """Only labelled rows reach the kernel: its time and memory grow with all rows, labelled or not."""
    kept_N = (labels_T.reshape(-1) != IGNORED).nonzero().squeeze(1)
    if kept_N.numel() == 0:  # the kernel divides by the number of rows
        return label_loss(hidden_TD, weight_VD, labels_T, bias=bias)
    dtype = _computed(hidden_TD)
    hidden_ND = hidden_TD.reshape(-1, hidden_TD.shape[-1]).index_select(0, kept_N).to(dtype)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        return fused(
            hidden_ND,
            weight_VD.to(dtype),
            labels_T.reshape(-1).index_select(0, kept_N),
            bias=None if bias is None else bias.to(dtype),
            ignore_index=IGNORED,
            reduction="sum",
            accum_dtype=torch.float32,  # of the head's gradient, as in `label_loss`
        )


def _computed(hidden_TD: Tensor) -> torch.dtype:
    """The dtype of the products, autocast included."""
    device = hidden_TD.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TD.dtype


@functools.cache
def _liger() -> Callable[..., Tensor] | None:
    """Liger's function, or None where it is not installed."""
    if find_spec("liger_kernel") is None:
        return None
    found: Callable[..., Tensor] = import_module(
        "liger_kernel.transformers.functional"
    ).liger_fused_linear_cross_entropy
    return found
