"""Cross-entropy of a plain linear head over the labelled rows only, in chunks of rows.

`[rows, vocabulary]` never exists: each chunk's logits become its loss and its gradients, and are dropped. The gradients
are made in forward (three products with the head, none repeated) and scaled in backward.

Names: T tokens, N labelled tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["IGNORED", "chunk_rows", "label_loss"]

IGNORED = -100  # the label of a token without a loss, as in transformers
CHUNK_BYTES = 32 * 2**20  # of one chunk's float32 logits


def chunk_rows(vocabulary: int) -> int:
    """Rows whose float32 logits fit into `CHUNK_BYTES`, at least one."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def label_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sum of the cross-entropies of `hidden_TD @ weight_VD.T + bias` against `labels_T`, over labels other than -100.

    Args:
        hidden_TD: `[..., D]`, already shifted: row t predicts `labels_T[t]`.
        weight_VD: the head's weight; any dtype. Its gradient is made only if it is asked for, summed in float32.
        labels_T: integers `[...]`, -100 where there is nothing to predict.
        bias: `[V]` or None.
        chunk: rows per chunk; by default as many as 32 MiB of logits hold.

    Returns:
        A scalar, float32 (float64 for float64 inputs); zero, with zero gradients, where no row has a label. The
        products have the dtype of `F.linear` (autocast included), the softmax and the sums are float32.
    """
    kept_N = (labels_T.reshape(-1) != IGNORED).nonzero().squeeze(1)
    hidden_ND = hidden_TD.reshape(-1, hidden_TD.shape[-1]).index_select(0, kept_N)
    labels_N = labels_T.reshape(-1).index_select(0, kept_N)
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))
    chunk = chunk_rows(weight_VD.shape[0]) if chunk is None else chunk
    assert chunk > 0, chunk
    with torch.autocast(device, enabled=False):
        loss: Tensor = _LabelLoss.apply(hidden_ND, weight_VD, bias, labels_N, chunk, torch.is_grad_enabled())
    return loss


class _LabelLoss(torch.autograd.Function):
    """Every row has a label here. Gradients are unscaled sums; backward multiplies by the incoming scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias: Tensor | None,
        labels_N: Tensor,
        chunk: int,
        with_gradients: bool,
    ) -> Tensor:
        compute = hidden_ND.dtype
        wide = torch.promote_types(compute, torch.float32)
        weight = weight_VD.to(compute)
        offset = None if bias is None else bias.to(compute)
        hidden_grad, weight_grad, bias_grad = (with_gradients and needed for needed in ctx.needs_input_grad[:3])
        d_hidden = torch.empty_like(hidden_ND) if hidden_grad else None
        d_weight = torch.zeros_like(weight, dtype=wide) if weight_grad else None
        d_bias = torch.zeros_like(weight[:, 0], dtype=wide) if bias_grad else None

        total = hidden_ND.new_zeros((), dtype=wide)
        # One table for all chunks: tables made and freed in turn leave the heap in pieces.
        table_cV = weight.new_empty((min(chunk, labels_N.shape[0]), weight.shape[0]), dtype=wide)
        for start in range(0, labels_N.shape[0], chunk):
            rows = slice(start, start + chunk)
            labels_c1 = labels_N[rows].unsqueeze(1)
            log_p_cV = table_cV[: len(labels_c1)]
            torch.log_softmax(F.linear(hidden_ND[rows], weight, offset), -1, dtype=wide, out=log_p_cV)
            total -= log_p_cV.gather(1, labels_c1).sum()
            if d_hidden is None and d_weight is None and d_bias is None:
                continue
            d_logits_cV = log_p_cV.exp_()
            d_logits_cV.scatter_add_(1, labels_c1, -torch.ones_like(labels_c1, dtype=wide))
            if d_bias is not None:
                d_bias += d_logits_cV.sum(dim=0)
            d_logits_cV = d_logits_cV.to(compute)  # what the products of plain autograd read
            if d_hidden is not None:
                torch.mm(d_logits_cV, weight, out=d_hidden[rows])
            if d_weight is not None and compute == wide:
                d_weight.addmm_(d_logits_cV.T, hidden_ND[rows])
            elif d_weight is not None:
                d_weight += d_logits_cV.T @ hidden_ND[rows]
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        # Widened first: a loss scale of 65536 is infinite in float16.
        scaled = [
            None if unscaled is None else (unscaled.to(scale.dtype) * scale).to(dtype)
            for unscaled, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        ]
        return (*scaled, None, None, None)
