"""Any PEFT adapter as a delta: plain LoRA as low-rank pairs, everything else as what PEFT's own merge writes."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.budget import distinct_parameters
from ..core.errors import ThriftyError
from ..core.low_rank import LowRank
from .adapter import CONFIG, STATE
from .delta import Delta, _parameters
from .diff import diff
from .digest import fingerprint
from .files import JSON, AnyPiece
from .low_rank import LowRankPiece
from .peer import PeerDelta, _logits, logit_difference, merge

__all__ = ["from_adapter"]

_log = logging.getLogger("thrifty")
_FAILURES = (ValueError, TypeError, KeyError, AttributeError, RuntimeError)  # with which PEFT refuses
_SHARED = ("vblora_vector_bank", ".tinylora_v.", ".unilora_theta_d.")  # stored once, for all modules


def from_adapter(adapter: str | os.PathLike[str] | PeerDelta, model: nn.Module) -> Delta:
    """The change that a PEFT adapter makes to `model`, its base, which stays as it is; a copy is made for PEFT.

    adapter: a folder that PEFT wrote, a delta's folder of a PEFT method, or such a delta. Plain LoRA on linear layers
    gives low-rank pairs, rounded once; everything else the exact regions of what PEFT's own merge wrote. The largest
    difference that this makes to the logits is in `info["logit_difference"]`, and logged. ThriftyError where the
    adapter does not fit the model, cannot be merged, or changes nothing.
    """
    parameters = _parameters(model)
    peer = adapter if isinstance(adapter, PeerDelta) else _read(Path(adapter), model)
    for name, expected in peer.base.items():
        if name not in parameters or fingerprint(parameters[name]) != expected:
            raise ThriftyError(f"{name} differs from the base of this adapter: another base, or a changed one")
    assert peer.config is not None
    kind = peer.config.peft_type.value
    if peer.config.is_prompt_learning:
        raise ThriftyError(
            f"{kind} adds virtual tokens, which are no change of weights: load its adapter with "
            "peft.PeftModel.from_pretrained"
        )
    try:
        wrapped = _load(peer, copy.deepcopy(model))
        pairs = _pairs(wrapped, model)
        if pairs is None:
            merged, difference = merge(wrapped)
    except _FAILURES as error:
        if isinstance(error, ThriftyError):
            raise
        raise ThriftyError(f"PEFT cannot put this {kind} adapter into the model's weights: {error}") from error
    if pairs is None:
        delta = diff(dict(model.named_parameters()), dict(merged.named_parameters()))
        delta.pieces = dict(delta.pieces)  # of their own: the two models may change
    elif pairs:
        delta = Delta(pairs, method={}, total=distinct_parameters(model))
        before = _logits(wrapped)
        delta.apply(model)
        difference = logit_difference(before, _logits(model))
        delta.remove(model)
        _log.info("low-rank pairs: largest logit difference %.2e", difference)
    else:
        raise ThriftyError(f"this {kind} adapter changes nothing: it was not trained")
    delta.method = dict(peer.method)
    delta.info = dict(peer.info) | {"logit_difference": difference}
    return delta


def _read(folder: Path, model: nn.Module) -> PeerDelta:
    """The adapter in `folder`."""
    if (folder / JSON).is_file():
        delta = Delta.load(folder)
        if not isinstance(delta, PeerDelta):
            raise ThriftyError(f"{folder} is a delta already, not a PEFT adapter")
        return delta
    if not (folder / CONFIG).is_file():
        raise ThriftyError(f"{folder} is no PEFT adapter: it holds no {CONFIG}")
    if not (folder / STATE).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        raise ThriftyError(
            f"{folder} holds no {STATE}"
            + (
                f", and {pickles[0]} is a pickle, which can run any code: save it again as safetensors"
                if pickles
                else ""
            )
        )
    try:
        from peft import PeftConfig
    except ImportError:
        raise ThriftyError(f"{folder} is a PEFT adapter: pip install 'thrifty[peft]' to read it") from None
    try:
        config, state = PeftConfig.from_pretrained(str(folder)), load_file(folder / STATE)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise ThriftyError(f"{folder} is damaged or incomplete ({error}): make or copy the adapter again") from None
    config.inference_mode = True
    method = {"peft": {"peft_type": config.peft_type.value}}
    return PeerDelta({}, method=method, total=distinct_parameters(model), state=state, config=config)


def _load(peer: PeerDelta, model: nn.Module) -> Any:
    """PEFT's wrapper around `model` with the adapter in it; ThriftyError where not all of it found a place."""
    from peft import PeftModel, set_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    assert peer.config is not None
    with torch.random.fork_rng():
        wrapped = PeftModel(model, copy.deepcopy(peer.config))
    found = set_peft_model_state_dict(wrapped, dict(peer.state))
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(peer.config.peft_type, "")
    own = [key for key in found.missing_keys if prefix in key and ".default" in key]
    missing = [key for key in own if not any(shared in key for shared in _SHARED)]
    if missing or found.unexpected_keys:
        first = missing[0] if missing else found.unexpected_keys[0]
        raise ThriftyError(
            f"the adapter {'lacks' if missing else 'holds'} {first}, which {'its' if missing else 'no'} layer on this "
            "model has: it is of another model, or damaged"
        )
    return wrapped


def _pairs(wrapped: Any, model: nn.Module) -> dict[str, AnyPiece] | None:
    """The pairs of a plain LoRA adapter; None where it is anything else."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    parameters = dict(model.named_parameters())
    inner = wrapped.get_base_model()
    for name, parameter in inner.named_parameters():
        if ".lora_" not in name:
            own = parameters.get(name.replace(".base_layer.", "."))
            if own is None or not torch.equal(parameter, own):
                return None  # a module of its own, a bias, or a base that PEFT rewrites when it starts
    layers = {name: module for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer)}
    pieces: dict[str, AnyPiece] = {}
    for name, module in layers.items():
        base, layer = parameters.get(f"{name}.weight"), module.get_base_layer()
        plain = type(module) is Linear and not module.lora_variant and not any(module.lora_bias.values())
        if base is None or not plain or not isinstance(layer, nn.Linear | Conv1D):
            return None
        a, b, scale = (each["default"] for each in (module.lora_A, module.lora_B, module.scaling))
        left, right = _used(b.weight.detach(), a.weight.detach())
        if scale <= 0 or len(right) > min(right.shape[1], len(left)):
            return None
        if len(right):
            left, right = (right.T, left.T) if isinstance(layer, Conv1D) else (left, right)
            rank = left.shape[1]
            pieces[f"{name}.weight"] = LowRankPiece.of(base, left, right, region=LowRank(rank, scale * rank))
    return pieces


def _used(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Without the components that are zero, in float32 or wider."""
    wide = torch.promote_types(a.dtype, torch.float32)
    used = (b != 0).any(0) & (a != 0).any(1)
    return b[:, used].to(wide), a[used].to(wide)
