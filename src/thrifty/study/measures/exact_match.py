"""`exact_match`: greedy answers that are the reference, character by character."""

from __future__ import annotations

from .subject import Found, Subject

__all__ = ["measure_exact_match"]


def measure_exact_match(subject: Subject, rows: int | bool) -> Found:
    """`exact_match`: [1 or 0, 1] of each row; both texts are stripped of white space. Inside `evaluating`."""
    answered = subject.answers(rows, name="exact_match")
    return {"exact_match": {"rows": [[int(one.correct), 1] for one in answered]}}
