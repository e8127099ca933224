"""`add_tokens` of a run file: what it may hold, the rows that it asks for, the tokenizer that a run leaves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from thrifty.core.errors import ThriftyError
from thrifty.core.files import new_folder
from thrifty.core.method import Method
from thrifty.delta import NewTokens
from thrifty.delta.vocabulary import check
from thrifty.update.peer import NO_NEW_TOKENS

__all__ = ["check_tokens", "grow", "save_tokenizer"]


def check_tokens(tokens: Sequence[str], method: Method) -> None:
    """ThriftyError for a list that cannot be added, or a method beside which no rows are trained."""
    check(tokens)
    if method.parts[0].select is None:
        raise ThriftyError(f"add_tokens: {NO_NEW_TOKENS}")


def grow(
    model: PreTrainedModel, ids: Mapping[str, int], *, rows: Iterable[Mapping[str, Sequence[int]]], console: Console
) -> NewTokens | None:
    """Rows in `model` for the tokens in `ids`, if there are any. Says which of them no training row holds."""
    if not ids:
        return None
    new = NewTokens.of(model, ids)
    new.grow(model)
    text = f"new tokens: {len(ids)}; the vocabulary has {new.rows:,} rows, {new.rows - new.base_rows} of them new"
    seen = set().union(*(row["input_ids"] for row in rows))
    if unseen := [token for token, number in ids.items() if number not in seen]:
        text += f"; in no training row: {', '.join(map(repr, unseen))}"
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    return new


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the folder `tokenizer` whole, in place of an earlier one."""
    with new_folder(folder) as aside:
        tokenizer.save_pretrained(aside)
