"""`choice`: the likeliest of given options."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from thrifty.run.evaluation import choose, option_lists

from .subject import Found, Subject

__all__ = ["measure_choice"]


def measure_choice(subject: Subject, rows: int | bool, *, choices: Sequence[str] | None) -> Found:
    """`choice`: [1 or 0, 1] of each row, and `majority`, the share of the most frequent reference among them.

    An option's likelihood is the product over its tokens, end of turn included. Inside `evaluating`.

    Args:
        choices: the options of rows that have none of their own; else the distinct answers of all examples.
    """
    picked = subject.first(rows, name="choice")
    texts = option_lists(picked, given=choices, among=subject.examples)
    chosen = choose(subject.model, subject.tokenizer, picked, texts, batch_size=subject.batch_size)
    [(_, most)] = Counter(one.reference for one in chosen).most_common(1)
    return {"choice": {"rows": [[int(one.correct), 1] for one in chosen], "majority": most / len(chosen)}}
