"""Fingerprints of tensors."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["fingerprint"]


def fingerprint(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().flatten()
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
