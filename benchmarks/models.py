"""The models that are measured: their sizes are those of published ones, what they hold matters only for SmolLM2."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from thrifty.run.model import load_model

__all__ = ["SHAPES", "build"]

SHAPES = {
    "smollm2": ("SmolLM2-135M, its real weights", 4, 256),
    "llama": ("Llama-3.2-1B cut to 4 layers, full vocabulary, random weights", 2, 512),
    "qwen": ("Qwen2.5-0.5B, QKV bias, random weights", 2, 256),
}

_LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 4096,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
_QWEN = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def build(shape: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of `shape`, in training mode."""
    if shape == "smollm2":
        return load_model("smollm2-135m", dtype=str(dtype).removeprefix("torch.")).train()
    config: AutoConfig = LlamaConfig(**_LLAMA) if shape == "llama" else Qwen2Config(**_QWEN)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()
