"""`quantize` in a run file: what does not go with it, and when the base is quantized."""

from __future__ import annotations

import torch
from torch import nn

from thrifty.core.errors import ThriftyError
from thrifty.core.method import parse_method
from thrifty.update.quantize import quantize
from thrifty.update.quantized import check_method

from .config import RunConfig
from .model import base_and_deltas, refuse_deltas

__all__ = ["quantize_base", "refuse_quantized", "whole_on"]


def refuse_quantized(config: RunConfig, *, processes: int = 1) -> None:
    """ThriftyError for what cannot be trained on the quantized base that `config` asks for."""
    if config.quantize is None:
        return
    refuse_deltas(base_and_deltas(config.model)[1])
    if processes > 1:
        raise ThriftyError("quantize: several processes cannot share a quantized base yet: start one, or leave it out")
    method = parse_method(config.method)
    if method.parts[0].select is not None:
        check_method(method)


def whole_on(config: RunConfig, device: torch.device) -> torch.device | None:
    """Where the model is loaded: one that is to be quantized never lies on `device` as a whole."""
    return device if config.quantize is None else None


def quantize_base(config: RunConfig, model: nn.Module, *, device: torch.device) -> None:
    """Quantize `model` as `config` says, on `device`."""
    if config.quantize is not None:
        quantize(model, config.quantize, device=device)
