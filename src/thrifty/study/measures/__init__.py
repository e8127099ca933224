"""What a trained model is judged by."""

from __future__ import annotations

__all__ = ["better"]

_LOWER = ("/perplexity", "/word_perplexity", "/byte_perplexity", "/bits_per_byte")


def better(name: str) -> str:
    """Which way a measure improves: "lower" or "higher"."""
    return "lower" if name in ("loss", "forgetting") or name.endswith(_LOWER) else "higher"
