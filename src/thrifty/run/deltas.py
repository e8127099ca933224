"""Deltas by name: the folder of a delta or of a run, and the base that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from thrifty.core.errors import ThriftyError, nearest
from thrifty.delta import Delta, fingerprint
from thrifty.delta.adapter import adapter_difference
from thrifty.delta.algebra import combine
from thrifty.delta.delta import is_applied
from thrifty.delta.from_peft import from_adapter
from thrifty.delta.shira import save_shira
from thrifty.delta.to_peft import save_lora

from .evaluate import evaluate, examples_of
from .folder import Place, locate
from .merged import Checkpoint
from .model import ModelName, base_and_deltas, delta_folder, load_model, load_tokenizer, resolve

__all__ = ["base_folder", "base_name", "base_tensors", "convert", "open_delta", "sweep", "unused", "verify"]


def open_delta(source: str) -> Delta:
    """The delta in the folder of a delta or of a run."""
    return Delta.load(delta_folder(source))


def base_name(source: str, base: str | None) -> ModelName:
    """The model that the delta belongs to: `base`, else what the run around it names."""
    return base if base is not None else locate(str(delta_folder(source))).config.model


def base_folder(source: str, base: str | None) -> str:
    """The base where it lies as a checkpoint. ThriftyError where it is itself made of a base and deltas."""
    name, deltas = base_and_deltas(base_name(source, base))
    if deltas:
        raise ThriftyError(
            f"the base of {source} is {name} with {len(deltas)} deltas in it, which is no checkpoint: use "
            "`thrifty export`, or `thrifty delta stack` first"
        )
    return name


def unused(output: str) -> str:
    """`output`; ThriftyError where the folder is in use: a delta in it may be all that is left of a run."""
    folder = Path(output)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ThriftyError(f"{output} exists: name a new folder, or remove it first")
    return output


def convert(
    source: str, *, to: str, output: str, base: str | None = None, rank: int | None = None, error: float | None = None
) -> Iterator[str]:
    """A delta as PEFT's adapter (`lora`, `shira`), or a PEFT adapter as a delta. Gives lines that say what was written
    and how far the logits of 32 random tokens are off."""
    if to == "delta":
        is_run = any((Path(source) / inner / "delta.json").is_file() for inner in ("", "delta"))
        if base is None and not is_run:
            raise ThriftyError(f"{source} is a PEFT adapter without its run: name its base model with --base")
        folder = delta_folder(source) if is_run else Path(source)
        delta = from_adapter(folder, load_model(base_name(source, base)))
        delta.save(unused(output))
        yield f"wrote {output}: {delta.plan.trainable_parameters:,} numbers in {len(delta.plan)} tensors"
        yield f"largest logit difference: {delta.info['logit_difference']:.3g}"
        return
    delta, name = open_delta(source), base_name(source, base)
    piece = next(iter(delta.pieces.values()), None)
    model = load_model(name, dtype="float32" if piece is None else piece.dtype)
    label = name if isinstance(name, str) else None
    if to == "lora":
        adapter = save_lora(delta, output, model, rank=rank, error=error, base_model=label)
        yield f"wrote {output}: LoRA, {adapter.error:.2%} of the change lost"
        if odd := [key for key in ("modules_to_save", "lora_bias", "rank_pattern") if adapter.config.get(key)]:
            yield f"it needs PEFT's {' and '.join(odd)}, which vLLM does not load"
    else:
        yield f"wrote {output}: SHiRA, r {save_shira(delta, output, model, base_model=label)}"
    yield f"largest logit difference: {adapter_difference(delta, output, model):.3g}"


def base_tensors(model: ModelName, *, dtype: torch.dtype) -> Mapping[str, Tensor]:
    """Parameter name -> tensor of the model under `model`. Read from its files one at a time where these use the
    model's own names; else the model is loaded, and each tied tensor goes by all of its names."""
    name, deltas = base_and_deltas(model)
    folder = Path(resolve(name))
    if not deltas and folder.is_dir():
        checkpoint = Checkpoint(folder, dtype=dtype)
        if set(checkpoint) <= _parameter_names(folder):
            return checkpoint
    return {n: p.detach() for n, p in load_model(model, dtype=dtype).named_parameters(remove_duplicate=False)}


def _parameter_names(folder: Path) -> set[str]:
    """Of the model in `folder`, tied ones too; none where transformers cannot tell without loading it."""
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (ValueError, OSError):
        return set()
    return {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}


def verify(delta: Delta, model: ModelName) -> dict[str, str]:
    """Parameter name -> `base` (the delta can be applied), `applied` (exactly its values are there: it can be removed),
    `unchanged` (the delta changes nothing in it, so it is both), or what is wrong."""
    found = {}
    tensors = _as_trained(delta, model)
    for name, piece in delta.pieces.items():
        tensor = tensors.get(name)
        if tensor is None:
            close = nearest(name, tensors)
            found[name] = "missing" + (f" (nearest: {close})" if close else "")
        elif tuple(tensor.shape) != piece.shape or tensor.dtype != piece.dtype:
            found[name] = f"{tensor.dtype} {tuple(tensor.shape)} instead of {piece.dtype} {piece.shape}"
        else:
            base, applied = fingerprint(tensor) == piece.fingerprint, is_applied(piece, tensor)
            states = {(True, True): "unchanged", (True, False): "base", (False, True): "applied"}
            found[name] = states.get((base, applied), "another base, or a changed one")
    return found


def _as_trained(delta: Delta, model: ModelName) -> Mapping[str, Tensor]:
    """The tensors of `model`, with the rows that the delta's new tokens had before training where it lacks them."""
    dtype = next(iter(delta.pieces.values())).dtype
    if delta.new_tokens is None:
        return base_tensors(model, dtype=dtype)
    loaded = load_model(model, dtype=dtype)
    if delta.new_tokens.grow(loaded):
        delta.fill(loaded, first=delta.new_tokens.base_rows)
    return {n: p.detach() for n, p in loaded.named_parameters(remove_duplicate=False)}


def sweep(place: Place, weights: Sequence[float]) -> Iterator[tuple[float, dict[str, float]]]:
    """The run's model between base (0) and fine-tuned (1), evaluated as its configuration says at each weight
    (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", equation 1). The model is loaded once."""
    assert place.delta is not None
    config, delta = place.config, open_delta(place.delta)
    if config.quantize is not None:
        raise ThriftyError("weights between base and fine-tuned need a base that is not quantized: quantize=null")
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
