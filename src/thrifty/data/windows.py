"""Plain text to windows of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thrifty.core.errors import ThriftyError
from thrifty.data.readers import expand, read_text
from thrifty.data.template import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["cut", "windows"]


def windows(path: str, tokenizer: PreTrainedTokenizerBase, *, length: int) -> list[list[int]]:
    """The text file at `path` as windows of at most `length` ids, without overlap.

    Each begins with the tokenizer's start token where it has one. The last is shorter. A last single token, which
    nothing would predict, is left out.
    """
    return cut(read_text(expand(path)), Renderer(tokenizer), length=length)


def cut(text: str, renderer: Renderer, *, length: int) -> list[list[int]]:
    """`text` as windows; see `windows`."""
    prefix = renderer.prefix
    if length < len(prefix) + 2 - bool(prefix):
        raise ThriftyError(f"windows of {length} tokens predict nothing; max_length must be at least 2")
    ids = list(renderer.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    step = length - len(prefix)
    parts = [prefix + ids[start : start + step] for start in range(0, len(ids), step)]
    return [part for part in parts if len(part) > 1]
