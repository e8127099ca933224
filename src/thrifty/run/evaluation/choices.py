"""Multiple choice by likelihood: the option whose tokens, end of turn included, are the likeliest after the prompt."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from thrifty.core.errors import ThriftyError
from thrifty.data import Example, answer, encode_options

from .losses import sum_losses

__all__ = ["Chosen", "choose", "option_lists"]

_MOST_ANSWERS = 10  # distinct answers of a data set that may stand for its options
_NO_CUT = 2**31  # options of a row that was cut could not be told apart


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The option that the model finds the likeliest, and the right one, both stripped."""

    choice: str
    reference: str

    @property
    def correct(self) -> bool:
        """Whether they are the same, character by character."""
        return self.choice == self.reference


def option_lists(
    examples: Sequence[Example], *, given: Sequence[str] | None, among: Sequence[Example]
) -> list[list[str]]:
    """The options of each row: its own `choices`, else `given`, else the distinct answers of `among`.

    Raises `ThriftyError` where none of the three gives options, or where a row's answer is none of its options.
    """
    shared = [text.strip() for text in given] if given else None
    found = []
    for example in examples:
        own = example.choices
        if own is None and shared is None:
            shared = _distinct_answers(among, example)
        texts = [text.strip() for text in own] if own is not None else list(shared or ())
        reference = (answer(example) or "").strip()
        if reference not in texts:
            raise ThriftyError(
                f"{example.origin}: the answer {_short(reference)} is none of its options "
                f"({', '.join(map(_short, texts))}): write the answer as one of them, or set `choices`"
            )
        found.append(texts)
    return found


def _distinct_answers(among: Sequence[Example], example: Example) -> list[str]:
    distinct = list(dict.fromkeys((answer(other) or "").strip() for other in among))
    if not 2 <= len(distinct) <= _MOST_ANSWERS:
        raise ThriftyError(
            f"{example.origin}: no options to choose from: neither the row nor the configuration has `choices`, and "
            f"the evaluation rows have {len(distinct)} distinct answers (2 to {_MOST_ANSWERS} would serve as options)"
        )
    return distinct


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def choose(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    option_texts: Sequence[Sequence[str]],
    *,
    batch_size: int,
) -> list[Chosen]:
    """The likeliest option of each row, the first of equals. Inside `evaluating`."""
    rows: list[Mapping[str, Sequence[int]]] = []
    for example, texts in zip(examples, option_texts):
        encoded = encode_options(example, texts, tokenizer, max_length=_NO_CUT)
        rows += [{"input_ids": row.input_ids, "labels": row.labels} for row in encoded]
    losses = iter(sum_losses(model, rows, batch_size=batch_size))
    chosen = []
    for example, texts in zip(examples, option_texts):
        own = [loss for loss, _ in itertools.islice(losses, len(texts))]
        chosen.append(Chosen(choice=texts[own.index(min(own))], reference=(answer(example) or "").strip()))
    return chosen
