"""GGUF, llama.cpp's file format: written here for plain Llama and Qwen2 models whose tokenizer llama.cpp has a name
for; for all others there is the command of llama.cpp's own converter."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType, TokenType
from transformers import AutoConfig, PreTrainedConfig

from thrifty.core.errors import ThriftyError, unknown
from thrifty.core.files import disk_errors

from .merged import Checkpoint, read_json
from .model import load_tokenizer

__all__ = ["gguf_command", "write_gguf"]

_OWN = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_ARCHITECTURES = {"LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA, "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = ("ByteLevel", True)  # with GPT-2's own pattern; False after another one
_TOKENIZERS = {  # how text is split before the merges, whether whole words skip them -> llama.cpp's name for it
    (_BYTES, False): "gpt-2",
    (("Digits", True), _BYTES, False): "smollm",
    (("Split", _WORDS % r"\p{N}"), ("ByteLevel", False), False): "qwen2",
    (("Split", _WORDS % r"\p{N}{1,3}"), ("ByteLevel", False), True): "llama-bpe",
}


def gguf_command(folder: str | os.PathLike[str], *, outtype: str | None = None) -> str:
    """The command of llama.cpp that turns the checkpoint in `folder` into a GGUF file inside it. outtype: such as f16
    or q8_0; unless given, the one that keeps every bit of the checkpoint's dtype."""
    path = Path(folder)
    kind = outtype or _outtype(path)
    target = path / f"{path.resolve().name}-{kind}.gguf"
    return shlex.join(["python", "convert_hf_to_gguf.py", str(path), "--outfile", str(target), "--outtype", kind])


def write_gguf(folder: str | os.PathLike[str], output: str | os.PathLike[str], *, outtype: str | None = None) -> str:
    """Write the checkpoint in `folder` as the GGUF file `output`, a tensor at a time, and return its path.

    outtype: what matrices are held in: f32, f16, bf16 or q8_0 (f16 where rows are no multiple of 32); by default what
    keeps every bit. Vectors are float32. ThriftyError, with llama.cpp's own command, for other architectures, scaled
    rotary positions and tokenizers that llama.cpp has no name for here.
    """
    path, target = Path(folder), Path(output)
    kind = outtype or _outtype(path)
    if kind not in _TYPES:
        raise ThriftyError(unknown("outtype", kind, _TYPES))
    if target.exists():
        raise ThriftyError(f"{target} exists: name a new file, or remove it first")
    config = AutoConfig.from_pretrained(path)
    if reason := _unfit(config):
        raise ThriftyError(f"{reason}: convert with llama.cpp: {gguf_command(path, outtype=outtype)}")
    tokenizer = read_json(path / "tokenizer.json")
    name = _TOKENIZERS.get(_splits(tokenizer))
    if name is None:
        raise ThriftyError(
            f"{path} splits text in a way that is not known here: convert with llama.cpp: "
            f"{gguf_command(path, outtype=outtype)}"
        )
    partial = target.with_name(f".partial-{target.name}")
    writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[config.architectures[0]]])
    try:
        with disk_errors(f"the file {target}", fix="free space and convert again"):
            _write_config(writer, config, name=path.resolve().name, kind=kind)
            _write_tokenizer(writer, path, tokenizer, rows=config.vocab_size, name=name)
            _write_tensors(writer, Checkpoint(path), config, kind=kind)
            writer.close()
            partial.rename(target)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return str(target)


def _outtype(folder: Path) -> str:
    config = read_json(folder / "config.json")
    return _OWN.get(str(config.get("dtype", config.get("torch_dtype"))), "auto")


def _unfit(config: PreTrainedConfig) -> str | None:
    """Why the model is not written here."""
    architecture = (config.architectures or ["a model without a name"])[0]
    if architecture not in _ARCHITECTURES:
        return f"{architecture} is not written here"
    if config.rope_parameters.get("rope_type") != "default" or config.hidden_act != "silu":
        return "scaled rotary positions and activations other than silu are not written here"
    options = ("attention_bias", "mlp_bias", "use_sliding_window")
    return next((f"{option} is not written here" for option in options if getattr(config, option, False)), None)


def _write_config(writer: gguf.GGUFWriter, config: PreTrainedConfig, *, name: str, kind: str) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(_TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _splits(tokenizer: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What `_TOKENIZERS` knows a tokenizer by; None where it does more than that."""
    model, before = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    normalizer = (tokenizer.get("normalizer") or {"type": "NFC"})["type"]  # llama.cpp leaves composing out
    odd = model.get("byte_fallback") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model.get("type") != "BPE" or normalizer != "NFC" or odd:
        return None
    found: list[Any] = []
    for step in before.get("pretokenizers", [before]):
        if step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            found.append(("ByteLevel", step.get("use_regex", True)))
        elif step.get("type") == "Digits":
            found.append(("Digits", step["individual_digits"]))
        elif step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            found.append(("Split", step["pattern"].get("Regex")))
        else:
            return None
    return (*found, bool(model.get("ignore_merges")))


def _write_tokenizer(
    writer: gguf.GGUFWriter, folder: Path, tokenizer: Mapping[str, Any], *, rows: int, name: str
) -> None:
    tokens = [f"[PAD{i}]" for i in range(rows)]  # of rows that no token has
    kinds = [TokenType.UNUSED] * rows
    known, further = tokenizer["model"]["vocab"], tokenizer.get("added_tokens", [])
    if max(*known.values(), *(added["id"] for added in further)) >= rows:
        raise ThriftyError(f"the tokenizer in {folder} has more tokens than the model's {rows:,} rows")
    for token, i in known.items():
        tokens[i], kinds[i] = token, TokenType.NORMAL
    for added in further:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=rows)
    loaded = load_tokenizer(folder)
    start = loaded("a").input_ids[0]
    special.add_special_token["bos"] = start == loaded.bos_token_id
    special.add_to_gguf(writer, quiet=True)


def _write_tensors(writer: gguf.GGUFWriter, checkpoint: Checkpoint, config: PreTrainedConfig, *, kind: str) -> None:
    names = gguf.get_tensor_name_map(_ARCHITECTURES[config.architectures[0]], config.num_hidden_layers)
    skipped = "lm_head.weight" if config.tie_word_embeddings else None
    written: dict[str, GGMLQuantizationType] = {}
    for name in checkpoint:
        if name == skipped or name.endswith(".rotary_emb.inv_freq"):
            continue
        shape = checkpoint.outline(name).shape
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ThriftyError(f"{name} is no tensor that {config.architectures[0]} has in a GGUF file")
        held = GGMLQuantizationType.F32 if len(shape) == 1 else _TYPES[kind][0]
        if shape[-1] % gguf.GGML_QUANT_SIZES[held][0]:
            held = GGMLQuantizationType.F16
        in_bytes = gguf.quant_shape_to_byte_shape(shape, held)
        writer.add_tensor_info(theirs, in_bytes, np.dtype(np.uint8), int(np.prod(in_bytes)), raw_dtype=held)
        written[name] = held
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, held in written.items():
        values = checkpoint[name].float().numpy()
        count = heads.get(name.split(".")[-2]) if config.model_type == "llama" else None
        if count is not None:  # the two halves of a rotated head are interleaved there
            values = values.reshape(count, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        writer.write_tensor_data(gguf.quants.quantize(np.ascontiguousarray(values), held))
