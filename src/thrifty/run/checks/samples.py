"""One row as the model sees it, with what is trained marked."""

from __future__ import annotations

import itertools

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from thrifty.data import Encoded
from thrifty.data.encode import IGNORED

__all__ = ["sample"]

_SHOWN = 600  # characters of a stretch; of a longer one the two ends are shown


def sample(row: Encoded, tokenizer: PreTrainedTokenizerBase, *, coloured: bool) -> Text:
    """The row decoded, control tokens included: what has a label in green, or in [[ ]] where there is no colour."""
    text = Text()
    for trained, run in itertools.groupby(zip(row.input_ids, _trained(row), strict=True), key=lambda pair: pair[1]):
        piece = _short(tokenizer.decode([token for token, _ in run]))
        if coloured:
            text.append(piece, style="green" if trained else "dim")
        else:
            text.append(f"[[{piece}]]" if trained else piece)
    if row.truncated:
        text.append(f" ... {row.tokens - len(row.input_ids)} tokens are cut off", style="yellow")
    indented = Text()
    for line in text.split("\n"):
        indented.append("\n" if indented else "").append("  | ").append_text(line)
    return indented


def _trained(row: Encoded) -> list[bool]:
    return [label != IGNORED for label in row.labels]


def _short(text: str) -> str:
    if len(text) <= _SHOWN:
        return text
    half = _SHOWN // 2
    return f"{text[:half]} ... {len(text) - 2 * half:,} characters ... {text[-half:]}"
