"""`forgetting`: the loss on a general text, which training did not see."""

from __future__ import annotations

from thrifty.run.evaluation import file_losses

from .subject import Found, Subject

__all__ = ["measure_forgetting"]


def measure_forgetting(subject: Subject, file: str) -> Found:
    """`forgetting`: [summed loss, tokens] of each of the text's first 64 windows of at most 512 tokens.

    Inside `evaluating`.
    """
    sums = file_losses(
        subject.model, subject.tokenizer, file, max_length=subject.max_length, batch_size=subject.batch_size
    )
    return {"forgetting": {"rows": [list(pair) for pair in sums]}}
