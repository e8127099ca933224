"""`loss`: the next-token loss on the labels of each row, as in training."""

from __future__ import annotations

from thrifty.run.evaluation import example_losses

from .subject import Found, Subject

__all__ = ["measure_loss"]


def measure_loss(subject: Subject, rows: int | bool) -> Found:
    """`loss`: [summed loss, labels] of each row; a plain text file's windows are rows. Inside `evaluating`."""
    sums = example_losses(
        subject.model,
        subject.tokenizer,
        subject.first(rows, name="loss"),
        max_length=subject.max_length,
        batch_size=subject.batch_size,
    )
    return {"loss": {"rows": [list(pair) for pair in sums]}}
