"""One run of a study: what decides it, and its name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from thrifty.run.config import RunConfig, load_config

from .fit import with_fits
from .rates import written

__all__ = ["Spec", "has_fit", "run_config"]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One run. `config`: its run file without `output_dir`, where `fit` still stands for a size to be found.

    `judged_by`: the rows of the measures. `fit_to`: the numbers that `fit` may come to, as `budget` writes them.
    """

    stage: str  # base, calibrate, search, final
    task: str
    method: str | None
    budget: str | None
    learning_rate: float | None
    seed: int
    config: dict[str, Any]
    measures: dict[str, Any]
    judged_by: Any
    fit_to: float | int | None = None
    seconds: float | None = None  # train so long: the number of steps comes from the calibration
    trial: int | None = None  # of Optuna, counted from 0
    proposed_budget: float | None = None  # by Optuna, a share
    word: str = ""  # of the budget, as part of the name

    @property
    def name(self) -> str:
        """Of its record."""
        words = [self.stage, self.task]
        if self.method is not None:
            words += [self.method, self.word]
        if self.stage == "search":
            words.append(f"t{self.trial}" if self.trial is not None else written(self.learning_rate or 0))
        if self.stage == "final":
            words.append(f"s{self.seed}")
        return "-".join(words)

    def digest(self) -> str:
        """SHA-256 of all that decides what the run does."""
        decides = [self.config, self.measures, self.judged_by, self.fit_to, self.seconds]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def run_config(spec: Spec, *, size: int = 1, **own: Any) -> RunConfig:
    """The configuration of a run, `fit` taken as `size`."""
    method = with_fits(spec.config["method"], size) if spec.method is not None else "full"
    return load_config({**spec.config, "method": method, **own}, needs_training_data=spec.method is not None)


def has_fit(method: Any) -> bool:
    """Whether an option of the method is to be fitted to its budget."""
    return bool(with_fits(method, 1) != method)
