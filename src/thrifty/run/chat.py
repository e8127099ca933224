"""Talking to a model in the terminal, or through a pipe: one line, one answer."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from thrifty.core.errors import ThriftyError
from thrifty.data import chat_prompt, stop_ids

from .folder import Place
from .model import apply_delta, load_model, load_tokenizer

__all__ = ["answer", "chat"]

_MOST_TOKENS = 512


def chat(place: Place, *, system: str | None = None) -> None:
    """Answer each line of standard input greedily, as it is generated, until the input ends or Ctrl-C is pressed.

    The conversation is kept; its oldest turns are left out once it no longer fits in the model.
    """
    config = place.config
    tokenizer = load_tokenizer(config.tokenizer or config.model, trust_remote_code=config.trust_remote_code)
    model = load_model(
        config.model, dtype=config.dtype, quantize=config.quantize, trust_remote_code=config.trust_remote_code
    )
    if place.delta is not None:
        model = apply_delta(place.delta, model=model, tokenizer=tokenizer)
    model.eval()
    first = [{"role": "system", "content": system}] if system else []
    turns: list[dict[str, Any]] = []
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        print("Ctrl-D leaves.")
    while True:
        try:
            line = input("> " if at_terminal else "").strip()
            if not line:
                continue
            turns.append({"role": "user", "content": line})
            reply = answer(model, tokenizer, first=first, turns=turns)
        except (EOFError, KeyboardInterrupt):
            if at_terminal:
                print()
            return
        turns.append({"role": "assistant", "content": reply})


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    first: list[dict[str, Any]],
    turns: list[dict[str, Any]],
) -> str:
    """Print the greedy answer to `first` and `turns` as it comes, and return it. `turns` loses what no longer fits."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    prompt = chat_prompt([*first, *turns], tokenizer)
    while len(prompt) + min(_MOST_TOKENS, positions // 4) > positions:
        if len(turns) < 3:
            raise ThriftyError(
                f"the message has {len(prompt)} tokens, too many for the {positions} of the model: shorten it"
            )
        del turns[:2]
        prompt = chat_prompt([*first, *turns], tokenizer)
    ends = stop_ids(tokenizer)
    ids = torch.tensor([prompt], device=model.device)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=min(_MOST_TOKENS, positions - len(prompt)),
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0),
    )
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=streamer
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
