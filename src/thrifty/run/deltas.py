"""Deltas by name: the folder of a delta or of a run, and the base that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from thrifty.core.errors import nearest
from thrifty.delta import Delta, fingerprint
from thrifty.delta.algebra import combine

from .evaluate import evaluate, examples_of
from .folder import Place, locate
from .model import ModelName, delta_folder, load_model, load_tokenizer

__all__ = ["base_name", "base_tensors", "open_delta", "sweep", "verify"]


def open_delta(source: str) -> Delta:
    """The delta in the folder of a delta or of a run."""
    return Delta.load(delta_folder(source))


def base_name(source: str, base: str | None) -> ModelName:
    """The model that the delta belongs to: `base`, else what the run around it names."""
    return base if base is not None else locate(str(delta_folder(source))).config.model


def base_tensors(model: ModelName, *, dtype: torch.dtype) -> Mapping[str, Tensor]:
    """Parameter name -> tensor of the model under `model`, each tied tensor by all of its names."""
    return {n: p.detach() for n, p in load_model(model, dtype=dtype).named_parameters(remove_duplicate=False)}


def verify(delta: Delta, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Parameter name -> `base` (the delta can be applied), `applied` (it can be removed), or what is wrong."""
    found = {}
    for name, piece in delta.pieces.items():
        tensor = tensors.get(name)
        if tensor is None:
            close = nearest(name, tensors)
            found[name] = "missing" + (f" (nearest: {close})" if close else "")
        elif tuple(tensor.shape) != piece.shape or tensor.dtype != piece.dtype:
            found[name] = f"{tensor.dtype} {tuple(tensor.shape)} instead of {piece.dtype} {piece.shape}"
        elif fingerprint(tensor) == piece.fingerprint:
            found[name] = "base"
        elif fingerprint(piece.base_of(tensor)) == piece.fingerprint:
            found[name] = "applied"
        else:
            found[name] = "another base, or a changed one"
    return found


def sweep(place: Place, weights: Sequence[float]) -> Iterator[tuple[float, dict[str, float]]]:
    """The run's model between base (0) and fine-tuned (1), evaluated as its configuration says at each weight
    (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", equation 1). The model is loaded once."""
    assert place.delta is not None
    config, delta = place.config, open_delta(place.delta)
    examples = examples_of(config)
    tokenizer = load_tokenizer(config.tokenizer or config.model, trust_remote_code=config.trust_remote_code)
    model = load_model(config.model, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
    if delta.new_tokens is not None:
        delta.new_tokens.extend(tokenizer)
    for weight in weights:
        base = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
        part = combine([(delta, weight)], base=base)
        part = replace(part, pieces=dict(part.pieces))  # made now, while the base is there
        part.apply(model)
        yield weight, evaluate(model, tokenizer, examples, config.eval, max_length=config.max_length)
        if weight:
            part.remove(model)
        elif part.new_tokens is not None:  # at 0 only the rows of the tokens were added
            part.new_tokens.shrink(model)
