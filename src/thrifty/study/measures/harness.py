"""`harness`: tasks of EleutherAI's evaluation harness (lm_eval)."""

from __future__ import annotations

from collections.abc import Sequence

from thrifty.run.harness import harness_scores

from .subject import Found, Subject

__all__ = ["measure_harness"]


def measure_harness(subject: Subject, tasks: Sequence[str], *, folder: str | None, limit: int | None) -> Found:
    """`task/metric`: [value, 1] of each document where lm_eval's score is their mean, else {"score": x}.

    Inside `evaluating`.

    Args:
        tasks: names and patterns, as `lm_eval --tasks` takes them.
        folder: more tasks, as YAML files.
        limit: documents of each task, the first ones; None: all.
    """
    found = harness_scores(
        subject.model,
        subject.tokenizer,
        tasks=tasks,
        folder=folder,
        where="harness",
        batch_size=subject.batch_size,
        limit=limit,
    )
    return {
        name: {"score": one.score} if one.values is None else {"rows": [[value, 1] for value in one.values]}
        for name, one in found.items()
    }
