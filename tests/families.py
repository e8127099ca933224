"""Tiny models of the contract's families, and batches for them. Everything is random, seeded and without dropout.

Sizes leave ragged edges under 16-blocks: hidden 40, intermediate 72, key/value 20, vocabulary 97.
"""

from __future__ import annotations

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

__all__ = ["ENCODERS", "FAMILIES", "VOCAB", "batches", "build", "classifier_batches", "config"]

FAMILIES = ("llama", "qwen2", "gpt2", "gemma2", "granite", "mixtral")
ENCODERS = ("bert_classifier", "bert_encoder")
VOCAB = 97

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
    "pad_token_id": 0,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 40,
    "n_inner": 72,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Caps and multipliers far from 1, so that a loss which forgets them is visibly wrong even on a tiny model.
_GEMMA2 = {
    "head_dim": 10,
    "query_pre_attn_scalar": 10,
    "sliding_window": 8,
    "final_logit_softcapping": 4.0,
    "attn_logit_softcapping": 5.0,
    "tie_word_embeddings": True,
}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}


def config(family: str, *, layers: int = 3) -> PreTrainedConfig:
    """The configuration of a tiny model of `family`."""
    if family == "gpt2":
        return GPT2Config(n_layer=layers, **_GPT2)
    if family in ENCODERS:
        return BertConfig(num_hidden_layers=layers, **_BERT)
    decoder = {**_DECODER, "num_hidden_layers": layers}
    if family == "llama":
        return LlamaConfig(**decoder)
    if family == "qwen2":
        return Qwen2Config(**decoder)
    if family == "gemma2":
        return Gemma2Config(**{**decoder, **_GEMMA2})
    if family == "granite":
        return GraniteConfig(**decoder, **_GRANITE)
    if family == "mixtral":
        return MixtralConfig(**decoder, num_local_experts=4, num_experts_per_tok=2)
    raise KeyError(family)


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 3) -> PreTrainedModel:
    """A tiny model of `family` in training mode. The same seed gives the same values, rounded once to `dtype`."""
    if family == "bert_classifier":
        model = AutoModelForSequenceClassification.from_config(config(family, layers=layers), dtype=torch.float32)
    elif family == "bert_encoder":
        model = AutoModel.from_config(config(family, layers=layers), dtype=torch.float32)
    else:
        # "eager": sdpa drops Gemma-2's cap on the attention scores.
        model = AutoModelForCausalLM.from_config(
            config(family, layers=layers), dtype=torch.float32, attn_implementation="eager"
        )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        # The stock 0.02 leaves the gradients of a model this narrow near zero.
        value = 0.2 * noise if parameter.dim() > 1 else parameter.detach() + 0.1 * noise
        # Parameters only: `model.to` would round the rotary tables, which from_pretrained keeps in float32.
        parameter.data = value.to(dtype)
    model.config.dtype = dtype
    return model.train()


def batches(n: int, rows: int, length: int, vocab: int = VOCAB, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """`n` batches `[rows, length]`: input_ids, attention_mask, labels; prompts masked, rows padded right, unevenly."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    made = []
    for _ in range(n):
        input_ids = torch.randint(3, vocab, (rows, length), generator=generator)
        attention_mask = torch.ones(rows, length, dtype=torch.long)
        labels = input_ids.clone()
        for row in range(rows):
            used = length if row == 0 else draw(max(3, length // 2), length + 1)
            prompt = draw(1, max(2, used // 2))
            input_ids[row, used:] = 0
            attention_mask[row, used:] = 0
            labels[row, :prompt] = -100
            labels[row, used:] = -100
        made.append({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})
    return made


def classifier_batches(
    n: int, rows: int, length: int, vocab: int = VOCAB, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Batches for `bert_classifier`: as `batches`, with one label in {0, 1, 2} per row."""
    made = batches(n, rows, length, vocab, seed)
    for batch in made:
        batch["labels"] = batch["input_ids"].sum(dim=1) % 3
    return made
