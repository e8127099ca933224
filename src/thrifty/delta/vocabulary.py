"""New tokens: a tokenizer and a model that know them, and the way back to the base's vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedModel

from ..core.errors import ThriftyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["NewTokens", "add_tokens", "check", "extend", "vocabulary_tensors"]

_ROWS = 4096  # summed at a time
_ADDED = "_thrifty_added_tokens"  # set on a model whose vocabulary `add_tokens` has changed


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """Tokens added to a base. `ids`: token -> id. The base's embedding has `base_rows` rows, the grown one `rows`; both
    are equal where the base's vocabulary was padded and had room."""

    ids: Mapping[str, int]
    base_rows: int
    rows: int

    @classmethod
    def of(cls, model: nn.Module, ids: Mapping[str, int]) -> NewTokens:
        """What `ids` ask of `model`, whose vocabulary is still the base's."""
        base_rows = _rows_of(model)
        return cls(ids=dict(ids), base_rows=base_rows, rows=max(base_rows, max(ids.values()) + 1))

    @property
    def trained(self) -> list[int]:
        """The rows that are trained: those of the tokens, and all that the base does not have."""
        return sorted({*self.ids.values(), *range(self.base_rows, self.rows)})

    def lacking(self, model: nn.Module) -> bool:
        """Has `model` the base's vocabulary, without the new rows? ThriftyError where it has neither."""
        here = _rows_of(model)
        if here not in (self.base_rows, self.rows):
            raise ThriftyError(
                f"the model's vocabulary has {here:,} rows; the tokens were added to one of {self.base_rows:,}: "
                "another model"
            )
        return here != self.rows

    def grow(self, model: nn.Module) -> bool:
        """Give `model` the rows that it lacks, in place; False where it has them all. Each new row of the embedding and
        of an untied head, and the number of a head's bias, is the exact mean of the old ones (float64, rounded once):
        transformers draws from a normal distribution around it, nothing here is drawn."""
        if not self.lacking(model):
            return False
        here = self.base_rows
        _resize(model, self.rows)
        for tensor in vocabulary_tensors(model).values():
            tensor.data[here:] = _mean(tensor.detach()[:here]).to(tensor.dtype).to(tensor.device)
        return True

    def shrink(self, model: nn.Module) -> None:
        """Take the rows that `grow` gave away again: the others keep every bit."""
        _resize(model, self.base_rows)
        if hasattr(model, _ADDED):
            delattr(model, _ADDED)

    def grown_rows(self, model: nn.Module) -> dict[str, Tensor]:
        """Parameter name -> a copy of the rows that the base does not have; empty where it has all."""
        if self.rows == self.base_rows:
            return {}
        return {name: t.detach()[self.base_rows :].clone() for name, t in vocabulary_tensors(model).items()}

    def extend(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make `tokenizer` know the tokens under the ids that they have here; ThriftyError where it cannot."""
        known = tokenizer.get_vocab()
        for token, expected in sorted(self.ids.items(), key=lambda item: item[1]):
            if token not in known:
                tokenizer.add_tokens([_added(token)])
            if (found := tokenizer.convert_tokens_to_ids(token)) != expected:
                raise ThriftyError(
                    f"token {token!r} is id {found} in this tokenizer, {expected} in the delta: give the tokenizer "
                    "of the delta's base"
                )

    def to_dict(self) -> dict[str, Any]:
        """The form in `delta.json`."""
        return {"ids": dict(self.ids), "base_rows": self.base_rows, "rows": self.rows}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> NewTokens:
        """What `to_dict` gave. ValueError where the numbers make no sense."""
        ids = {str(token): int(number) for token, number in value["ids"].items()}
        base_rows, rows = int(value["base_rows"]), int(value["rows"])
        if not (0 < base_rows <= rows and ids and all(0 <= number < rows for number in ids.values())):
            raise ValueError("new_tokens")
        return cls(ids=ids, base_rows=base_rows, rows=rows)


def add_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> NewTokens:
    """Add tokens to `tokenizer` and rows for them to `model`, in place; give the result to `attach(new_tokens=...)`:

        new = thrifty.add_tokens(model, tokenizer, ["<tool>"])
        tuning = thrifty.attach(model, "smt", budget=0.01, batches=batches, new_tokens=new)

    A token is never split, and stays in decoded text. New rows start at the mean of the old ones; rows that a padded
    vocabulary has already keep their values. ThriftyError, before anything changes, for a token that is known already,
    and for a second call on one model: the delta would ask for a base that has the first call's tokens.
    """
    _rows_of(model)  # what cannot grow is refused before the tokenizer changes
    if hasattr(model, _ADDED):
        raise ThriftyError(
            "add_tokens: tokens were added to this model before: give all tokens in one call, on the model as it was "
            "loaded"
        )
    new = NewTokens.of(model, extend(tokenizer, tokens))
    new.grow(model)
    setattr(model, _ADDED, True)
    return new


def extend(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> dict[str, int]:
    """Add `tokens` to `tokenizer`: token -> id. ThriftyError for an empty list, a duplicate, what is no text, and what
    is in the vocabulary already; then nothing is added."""
    check(tokens)
    known = tokenizer.get_vocab()
    if found := [token for token in tokens if token in known]:
        raise ThriftyError(
            f"add_tokens: {', '.join(map(repr, found))} {'is' if len(found) == 1 else 'are'} in the tokenizer's "
            "vocabulary already: leave out what is known"
        )
    tokenizer.add_tokens([_added(token) for token in tokens])
    return {token: int(tokenizer.convert_tokens_to_ids(token)) for token in tokens}


def check(tokens: Sequence[str]) -> None:
    """ThriftyError for what is no list of different texts."""
    if isinstance(tokens, str) or not isinstance(tokens, Sequence) or not tokens:
        raise ThriftyError(f"add_tokens must be a list of at least one token such as ['<tool>'], not {tokens!r}")
    for token in tokens:
        if not isinstance(token, str) or not token:
            raise ThriftyError(f"add_tokens: a token must be a text that is not empty, not {token!r}")
    if twice := [token for i, token in enumerate(tokens) if token in tokens[:i]]:
        raise ThriftyError(f"add_tokens: {twice[0]!r} is listed twice: list each token once")


def vocabulary_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors with a row (or a number) for each token: the embedding, an untied head, a head's bias."""
    assert isinstance(model, PreTrainedModel)
    holders = [model.get_input_embeddings(), model.get_output_embeddings()]
    found = {id(p) for module in holders if module is not None for p in module.parameters(recurse=False)}
    return {name: p for name, p in model.named_parameters() if id(p) in found}


def _added(token: str) -> AddedToken:
    # not special: decoding for people leaves special tokens out, and answers are compared as decoded
    return AddedToken(token, normalized=False, special=False)


def _rows_of(model: nn.Module) -> int:
    """Rows of the vocabulary; ThriftyError where the embedding and the head differ, or there are none."""
    if not isinstance(model, PreTrainedModel):
        raise ThriftyError(f"{type(model).__name__} is no transformers model: tokens cannot be added to it")
    sizes = {name: t.shape[0] for name, t in vocabulary_tensors(model).items()}
    if len(set(sizes.values())) != 1:
        text = ", ".join(f"{name} {rows}" for name, rows in sizes.items()) or "none"
        raise ThriftyError(f"tokens cannot be added to {type(model).__name__}: rows of its vocabulary: {text}")
    return next(iter(sizes.values()))


def _mean(rows: Tensor) -> Tensor:
    """The mean of `rows` `[n, ...]`, float64 on the CPU: some at a time, for adding up in float64 copies what it adds,
    and not every device has float64."""
    sums = [part.cpu().sum(0, dtype=torch.float64) for part in rows.split(_ROWS)]
    return torch.stack(sums).sum(0) / len(rows)


def _resize(model: nn.Module, rows: int) -> None:
    assert isinstance(model, PreTrainedModel)
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        with torch.random.fork_rng():
            model.resize_token_embeddings(rows, mean_resizing=False)
    except (TypeError, NotImplementedError) as error:
        raise ThriftyError(f"tokens cannot be added to {type(model).__name__}: {error}") from error
    for name, p in model.named_parameters():
        p.requires_grad_(required.get(name, p.requires_grad))
