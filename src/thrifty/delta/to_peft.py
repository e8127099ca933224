"""A delta as PEFT's own LoRA adapter, by truncated singular value decomposition.

The change of each linear layer's matrix becomes B A (B `[out, r]`, A `[r, in]`, scale 1), the nearest product of its
rank in the Frobenius norm. What is no matrix of a linear layer is stored whole, as one of PEFT's `modules_to_save`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import ThriftyError
from .adapter import PREFIX, check_base, common_config, target_names, write_adapter
from .algebra import dense_change
from .delta import Delta
from .files import AnyPiece
from .low_rank import LowRankPiece

__all__ = ["LoraAdapter", "save_lora", "to_lora"]

_TIED_BY_PEFT = ("embed_tokens", "lm_head")  # last names by which PEFT recognizes tied modules


@dataclass(frozen=True, kw_only=True)
class LoraAdapter:
    """A LoRA adapter in memory.

    state, config: what PEFT's two files hold. errors: module -> |change - B A| / |change| (Frobenius norms); error: the
    same over all of them together. Modules that are stored whole are exact and not among them.
    """

    state: Mapping[str, Tensor]
    config: Mapping[str, Any]
    errors: Mapping[str, float]
    error: float


def to_lora(
    delta: Delta,
    model: nn.Module,
    *,
    rank: int | None = None,
    error: float | None = None,
    base_model: str | None = None,
) -> LoraAdapter:
    """`delta` as a LoRA adapter for `model`, its base, which stays as it is.

    rank: one rank for all modules; where nothing but matrices of linear layers changed, this is the plain form that
    vLLM reads too. error: instead, for each module the least rank whose change is off by at most this share (0 keeps
    all). base_model: the base's name in the configuration, by default the one that `model` was loaded from. A low-rank
    pair whose rank fits is taken over as it is.

    Changed norms, embeddings and other modules without linear layers inside are stored whole; so are linear layers with
    a changed bias, unless all changed ones have a bias (PEFT's `lora_bias`). ThriftyError for new tokens, for what PEFT
    cannot store exactly, and where `model` is not the delta's base.
    """
    if (rank is None) == (error is None):
        raise ThriftyError("give either a rank, such as 16, or an error, such as 0.1")
    if rank is not None and rank < 1:
        raise ThriftyError(f"rank {rank} is not valid: give an integer of 1 or more, such as 16")
    if error is not None and not 0 <= error < 1:
        raise ThriftyError(f"error {error:g} is not valid: give a share of the change from 0 (all of it) to below 1")
    check_base(delta, model)
    places = _places(delta, model)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    moved: dict[str, tuple[float, float]] = {}
    for name in places.targets:
        weight, transposed = f"{name}.weight", isinstance(model.get_submodule(name), Conv1D)
        if weight in delta.pieces:
            pairs[name], moved[name] = _pair(weight, delta.pieces[weight], transposed, rank=rank, error=error)
        else:  # the bias alone
            shape = model.get_parameter(weight).shape
            rows, columns = reversed(shape) if transposed else shape
            pairs[name], moved[name] = (torch.zeros(rows, 0), torch.zeros(0, columns)), (0.0, 0.0)
    ranks = {name: rank or max(1, len(a)) for name, (_, a) in pairs.items()}
    state: dict[str, Tensor] = {}
    for name, (b, a) in pairs.items():
        missing = ranks[name] - len(a)  # zeros change nothing, and all modules may share one rank
        state[f"{PREFIX}{name}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, missing))
        state[f"{PREFIX}{name}.lora_B.weight"] = nn.functional.pad(b, (0, missing))
        if places.biased:
            state[f"{PREFIX}{name}.lora_B.bias"] = _bias(delta.pieces.get(f"{name}.bias"), len(b))
    for name in places.kept:
        state |= _whole(name, delta, model, places.aliases)
    off, change = (sum(both[i] for both in moved.values()) for i in (0, 1))
    return LoraAdapter(
        state=state,
        config=_config(places, model, ranks, base_model=base_model),
        errors={name: (a / b) ** 0.5 if b else 0.0 for name, (a, b) in moved.items()},
        error=(off / change) ** 0.5 if change else 0.0,
    )


def save_lora(
    delta: Delta,
    folder: str | os.PathLike[str],
    model: nn.Module,
    *,
    rank: int | None = None,
    error: float | None = None,
    base_model: str | None = None,
) -> LoraAdapter:
    """Write `to_lora`'s adapter as the folder that `PeftModel.from_pretrained` loads, whole or not at all. ThriftyError
    also where `folder` is in use."""
    adapter = to_lora(delta, model, rank=rank, error=error, base_model=base_model)
    write_adapter(Path(folder), adapter.state, adapter.config)
    return adapter


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Where a LoRA adapter holds what changed, by module name in the model's order."""

    targets: list[str]  # as pairs
    biased: bool  # the targets' biases change too
    kept: list[str]  # whole
    aliases: Mapping[str, str]  # a changed parameter's every name -> its name in the delta
    tied: bool  # embedding and head, which are one tensor, are among `kept`


def _places(delta: Delta, model: nn.Module) -> _Places:
    names: dict[int, list[str]] = defaultdict(list)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names[id(parameter)].append(name)
    weights, biases, kept, tied = set(), set(), set(), False
    aliases: dict[str, str] = {}
    for name in delta.pieces:
        module, _, attribute = name.rpartition(".")
        every = names[id(parameters[name])]
        aliases |= dict.fromkeys(every, name)
        alone = len(every) == 1 and isinstance(model.get_submodule(module), nn.Linear | Conv1D)
        if alone and attribute == "weight":
            weights.add(module)
        elif alone and attribute == "bias":
            biases.add(module)
        else:
            tied = tied or len(every) > 1
            kept |= {_checked(each, model, tied=len(every) > 1) for each in every}
    biased = bool(biases) and all(model.get_submodule(module).bias is not None for module in weights | biases)
    if not biased:
        kept |= {_checked(f"{module}.bias", model, tied=False) for module in biases}
    order = [name for name, _ in model.named_modules(remove_duplicate=False)]
    targets = [name for name in order if name in weights | biases and name not in kept]
    if not targets:
        raise ThriftyError(
            f"{next(iter(delta.pieces))} is no matrix of a linear layer, nor is anything else in this delta, and LoRA "
            "changes only these: merge the delta into a checkpoint instead"
        )
    return _Places(
        targets=targets, biased=biased, kept=[name for name in order if name in kept], aliases=aliases, tied=tied
    )


def _checked(name: str, model: nn.Module, *, tied: bool) -> str:
    """The module of the parameter `name`; ThriftyError where PEFT could not store it whole and find it again."""
    module = name.rpartition(".")[0]
    owner = model.get_submodule(module)
    outside = "" if module else "it belongs to the model itself"
    if tied and not any(owner is end for end in _ends(model)):
        outside = "it is tied to another tensor"
    elif len(list(owner.parameters())) > len(list(owner.parameters(recurse=False))):
        outside = f"{module} holds other modules with parameters"
    elif any(other.endswith(module) for other, _ in model.named_modules() if other != module):
        outside = f"PEFT would take other modules for {module}, whose names end alike"
    if outside:
        raise ThriftyError(f"LoRA cannot hold {name}: {outside}; merge the delta into a checkpoint instead")
    return module


def _ends(model: nn.Module) -> tuple[nn.Module | None, ...]:
    """The embedding and the head."""
    if not hasattr(model, "get_output_embeddings"):
        return ()
    return model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]


def _pair(
    name: str, piece: AnyPiece, transposed: bool, *, rank: int | None, error: float | None
) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
    """B and A (float32), and the squared norms of what they leave out and of the change."""
    change = dense_change(piece)
    if not bool(change.isfinite().all()):
        raise ThriftyError(f"{name} holds values that are not finite: there is no LoRA adapter for it")
    change = change.T if transposed else change
    own = None
    if isinstance(piece, LowRankPiece):
        left, right = piece.left.float() * piece.region.scale, piece.right.float()
        own = (right.T, left.T) if transposed else (left, right)
    b, a = _factors(change, own, rank=rank, error=error)
    left_out = float((change - b.double() @ a.double()).square().sum())
    return (b.contiguous(), a.contiguous()), (left_out, float(change.square().sum()))


def _factors(
    change: Tensor, own: tuple[Tensor, Tensor] | None, *, rank: int | None, error: float | None
) -> tuple[Tensor, Tensor]:
    if own is not None and rank is not None and len(own[1]) <= rank:
        return own
    rows, columns = (change != 0).any(1), (change != 0).any(0)  # the rest has no part in any singular vector
    u, s, v = torch.linalg.svd(change[rows][:, columns].float(), full_matrices=False)
    if rank is None:
        squares = s.double().square()
        left_over = (squares.flip(0).cumsum(0).flip(0) / squares.sum()).sqrt()  # with the first k left out
        rank = int((left_over > error).sum())
        if own is not None and len(own[1]) <= rank:
            return own
    root = s[:rank].sqrt()
    b, a = torch.zeros(len(change), len(root)), torch.zeros(len(root), change.shape[1])
    b[rows], a[:, columns] = u[:, :rank] * root, root[:, None] * v[:rank]
    return b, a


def _bias(piece: AnyPiece | None, size: int) -> Tensor:
    return torch.zeros(size) if piece is None else dense_change(piece).float()


def _whole(name: str, delta: Delta, model: nn.Module, aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """The trained values of a module, under PEFT's names."""
    found = {}
    for key, tensor in model.get_submodule(name).state_dict().items():
        value = tensor.detach().cpu().clone().contiguous()
        if (own := aliases.get(f"{name}.{key}")) is not None:
            delta.pieces[own].write_(value)
        found[f"{PREFIX}{name}.{key}"] = value
    return found


def _config(places: _Places, model: nn.Module, ranks: Mapping[str, int], *, base_model: str | None) -> dict[str, Any]:
    r = max(ranks.values())
    others = {name: own for name, own in ranks.items() if own != r}
    linear = (model.get_submodule(name) for name in places.targets)
    config = {
        **common_config("LORA", model, base_model=base_model),
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": target_names(places.targets, model, leaving_out=places.kept),
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in linear),
    }
    if others:
        config |= {"rank_pattern": others, "alpha_pattern": others}
    if places.biased:
        config["lora_bias"] = True
    if places.kept:
        config["modules_to_save"] = places.kept
    if places.tied and any(name.rpartition(".")[2] in _TIED_BY_PEFT for name in places.kept):
        config["ensure_weight_tying"] = True
    return config
