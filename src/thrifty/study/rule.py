"""On which tasks a share of right answers says anything at all."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["JUDGE", "JUDGED", "STANDARD_ERRORS", "Rule", "majority_rule"]

JUDGED = ("exact_match", "choice")
JUDGE = "full"
STANDARD_ERRORS = 3


@dataclass(frozen=True)
class Rule:
    """Whether a measure counts on a task; None where that could not be judged. `words` say why."""

    counts: bool | None
    words: str


def majority_rule(
    *, task: str, measure: str, full: float | None, error: float | None, floor: float | None, floor_is: str
) -> Rule:
    """A share of right answers counts where full fine-tuning beats what needs no learning by three standard errors.

    Args:
        full: the score of the method named `full`, its mean over seeds; None where it has no finished run.
        error: the standard error of that score over seeds and rows (`Spread.error`).
        floor: the score of the most frequent answer, or of the model before training.
        floor_is: which of the two, in words.
    """
    if full is None or floor is None or error is None:
        missing = f"no finished run of a method named {JUDGE}" if full is None else "no run of the base model"
        if full is not None and floor is not None:
            missing = f"{JUDGE} has no standard error"
        return Rule(None, f"{task}: whether {measure} counts was not judged ({missing}).")
    counts = full > floor + STANDARD_ERRORS * error
    says = (
        f"full fine-tuning scores {full:.3f} (standard error {error:.3f}), "
        f"{'more than' if counts else 'not'} {STANDARD_ERRORS} standard errors above {floor_is}, {floor:.3f}"
    )
    end = "." if counts else "; the loss is the measure there."
    return Rule(counts, f"{task}: {measure} {'counts' if counts else 'does not count'}: {says}{end}")
