"""Models and tokenizers by name: an embedded one, a folder, or a hub id. Weights come from safetensors only."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from thrifty.core.errors import ThriftyError, nearest, unknown
from thrifty.core.quantized import quantized_as
from thrifty.delta import Delta
from thrifty.update.quantize import apply_quantized
from thrifty.update.quantize import quantize as quantize_weights

from .embedded import EMBEDDED, embedded_folder, no_progress_bars
from .loading import streaming
from .model_folder import check_config, check_tensors

__all__ = [
    "ModelName",
    "apply_delta",
    "base_and_deltas",
    "check_weights",
    "delta_folder",
    "empty_model",
    "load_model",
    "load_tokenizer",
    "refuse_deltas",
    "resolve",
    "warn_unquantized",
]

# an embedded name, a folder or a hub id; or `{"base": one of these, "deltas": [folders]}`
ModelName = str | Path | Mapping[str, Any]

_log = logging.getLogger("thrifty")
_DTYPES: dict[str, torch.dtype | str] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "auto": "auto",
}


def base_and_deltas(spec: ModelName) -> tuple[str, list[str]]:
    """The base model, and the folders of the deltas that are applied to it, in order. ThriftyError where a mapping is
    not `{base: ..., deltas: [...]}`."""
    if not isinstance(spec, Mapping):
        return str(spec), []
    for key in spec:
        if key not in ("base", "deltas"):
            raise ThriftyError(unknown("key", f"model.{key}", ["model.base", "model.deltas"]))
    base, deltas = spec.get("base"), spec.get("deltas", [])
    if not isinstance(base, str) or not base:
        raise ThriftyError("model.base is missing: an embedded name, a folder or a hub id")
    if not isinstance(deltas, list | tuple) or not all(isinstance(folder, str) for folder in deltas):
        raise ThriftyError(f"model.deltas must be a list of folders of deltas or runs, not {deltas!r}")
    return base, list(deltas)


def delta_folder(source: str | Path) -> Path:
    """`source` where it is a delta, its `delta/` where it is a run. ThriftyError where it is neither."""
    folder = Path(source)
    for place in (folder, folder / "delta"):
        if (place / "delta.json").is_file():
            return place
    if not folder.exists():
        beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        close = nearest(folder.name, beside)
        hint = f" (did you mean {str(folder.parent / close)!r}?)" if close else ""
        raise ThriftyError(f"{source}: no such folder{hint}; give the folder of a delta or of a run")
    raise ThriftyError(f"{source} is no folder of a delta or of a finished run: it holds no delta.json")


def resolve(spec: str | Path) -> str:
    """What transformers can open: an embedded name's folder (made on first use), an existing folder, or a hub id.

    Raises:
        ThriftyError: `spec` is written as a path and there is no such folder; the embedded model cannot be had.
    """
    name = str(spec)
    if name in EMBEDDED:
        return str(embedded_folder(name))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise ThriftyError(f"model {name!r} is a file; give the folder that holds config.json and *.safetensors")
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith("/") or not name.strip():
        raise ThriftyError(f"model {name!r}: no such folder{_hint(path)}; give a folder, a hub id or {_embedded()}")
    return name


def load_model(
    spec: ModelName,
    *,
    dtype: str | torch.dtype = "float32",
    quantize: str | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """The causal language model `spec`, in evaluation mode.

    Args:
        spec: an embedded name (`smollm2-135m`), a folder, or a hub id; with deltas to apply, `{"base": ..., "deltas":
            [...]}`.
        dtype: what the weights are held in: `float32`, `bfloat16`, `float16`, or `auto` for the checkpoint's own.
        quantize: `int8`, `int4` or `nf4`, for the weights of linear layers; None leaves them as they are.
        trust_remote_code: whether Python files that come with the checkpoint may run.
        device: where to put it; the CPU by default.

    Attention is PyTorch's `sdpa` where the model supports it, as transformers chooses by itself.

    Raises:
        ThriftyError: nothing is found under `spec`; the checkpoint has pickles only, is damaged, lacks tensors of the
            model, or is not a causal language model.
    """
    if not isinstance(dtype, torch.dtype) and dtype not in _DTYPES:
        raise ThriftyError(unknown("dtype", str(dtype), _DTYPES))
    base, deltas = base_and_deltas(spec)
    if quantize is not None:
        refuse_deltas(deltas)
    model = _load_base(base, dtype=dtype, trust_remote_code=trust_remote_code)
    for folder in deltas:
        model = _applied(Delta.load(delta_folder(folder)), model)
    if quantize is not None:
        quantize_weights(model, quantize, device=device)
    return model if device is None else model.to(device)


def refuse_deltas(deltas: Sequence[str]) -> None:
    """ThriftyError where a base that is to be quantized has deltas."""
    if deltas:
        raise ThriftyError(
            "quantize needs a base without deltas, whose folder holds the original values of trained blocks: "
            "`thrifty export` them to a folder first, and name that as model"
        )


def _applied(delta: Delta, model: PreTrainedModel, *, as_plain: bool = False) -> Any:
    """`model` with `delta` in it: a PreTrainedModel, or PEFT's wrapper of a quantized one."""
    if quantized_as(model) is not None:
        return apply_quantized(delta, model, as_plain=as_plain)
    warn_unquantized(delta)
    return delta.apply(model)


def warn_unquantized(delta: Delta) -> None:
    """Where `delta` was trained on a quantized base, and meets one that is not."""
    if (form := delta.info.get("quantize")) is not None:
        _log.warning("the delta was trained on a base quantized to %s: on this one its answers differ a little", form)


def _load_base(spec: str, *, dtype: str | torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    source = resolve(spec)
    local = Path(source).is_dir()
    if local:
        check_config(Path(source))
        check_tensors(Path(source))
    held = _DTYPES.get(str(dtype), dtype)
    try:
        with no_progress_bars() if local else contextlib.nullcontext(), streaming(held):
            model, report = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=held,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_loaded("model", spec, source, error) from error
    if missing := sorted(report["missing_keys"]):
        raise ThriftyError(
            f"model {spec!r} lacks {len(missing)} tensors of {type(model).__name__}, first {missing[0]!r}: "
            "the checkpoint is incomplete or not one of a causal language model"
        )
    assert isinstance(model, PreTrainedModel)
    return model


def empty_model(spec: ModelName, *, dtype: str = "float32", trust_remote_code: bool = False) -> PreTrainedModel:
    """The base of `spec` without values, on the meta device: its names, shapes and configuration in a second.

    Raises:
        ThriftyError: as `load_model`, as far as that can be told without weights (see `check_weights`).
    """
    base, deltas = base_and_deltas(spec)
    source = resolve(base)
    if Path(source).is_dir():
        check_config(Path(source))
    for folder in deltas:
        delta_folder(folder)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=_DTYPES.get(dtype, dtype), trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError) as error:
        raise _not_loaded("model", base, source, error) from error
    assert isinstance(model, PreTrainedModel)
    return model


def check_weights(spec: ModelName) -> None:
    """ThriftyError where the folder of `spec`'s base holds no weights that can be loaded."""
    source = resolve(base_and_deltas(spec)[0])
    if Path(source).is_dir():
        check_tensors(Path(source))


def load_tokenizer(spec: ModelName, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of `spec`, which is written as for `load_model`; it knows the tokens that deltas added.

    Where there is no padding token, the end-of-text token (else the unknown one) pads: nothing is added to the
    vocabulary, and padding is told from text by the attention mask and the labels, never by its id.

    Raises:
        ThriftyError: no tokenizer under `spec`, or one without any token to pad with.
    """
    spec, deltas = base_and_deltas(spec)
    source = resolve(spec)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _not_loaded("tokenizer", spec, source, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ThriftyError(
            f"tokenizer {spec!r} has no padding, end-of-text or unknown token to pad rows with: "
            "set pad_token in its tokenizer_config.json"
        )
    for folder in deltas:
        if (new := Delta.load(delta_folder(folder)).new_tokens) is not None:
            new.extend(tokenizer)
    return tokenizer


def apply_delta(
    folder: str | Path, *, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, as_plain: bool = False
) -> Any:
    """Put the delta in `folder` on its base `model`, and teach `tokenizer` the tokens that were added to it. A
    quantized base stays quantized, unless it is wanted `as_plain`."""
    delta = Delta.load(delta_folder(folder))
    if delta.new_tokens is not None:
        delta.new_tokens.extend(tokenizer)
    return _applied(delta, model, as_plain=as_plain)


def _not_loaded(kind: str, spec: str, source: str, error: Exception) -> ThriftyError:
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 300 else f"{reason[:300].rstrip()}..."
    if Path(source).is_dir():
        return ThriftyError(f"{kind} {spec!r} cannot be loaded from {source}: {reason}")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    return ThriftyError(
        f"{kind} {spec!r}: no folder of that name{_hint(Path(spec))}, not {_embedded()}, "
        f"and not to be had from the hub{' (HF_HUB_OFFLINE is set)' if offline else ''}: {reason}; give a folder, or "
        f"fetch it where the hub can be reached: hf download {spec}"
    )


def _embedded() -> str:
    return f"the embedded {' or '.join(map(repr, EMBEDDED))}"


def _hint(path: Path) -> str:
    """The nearest folder beside the one asked for, or the nearest embedded name."""
    beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    close = nearest(path.name, beside)
    found = str(path.parent / close) if close else nearest(str(path), EMBEDDED)
    return f" (did you mean {found!r}?)" if found else ""
