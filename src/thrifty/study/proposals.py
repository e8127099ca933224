"""Learning rates, and budgets, proposed by Optuna."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from thrifty.core.errors import ThriftyError

from .config import Range, Search

__all__ = ["propose"]


def propose(
    search: Search, past: Sequence[tuple[Mapping[str, Any], float]], *, seed: int
) -> tuple[float, float | None]:
    """The next learning rate and, where it is searched too, the next budget as a share.

    `past`: the `run_info` and the loss of each trial so far, in order; the same past gives the same proposal. A failed
    trial counts as a bad loss.
    """
    try:
        import optuna
    except ImportError:
        raise ThriftyError("search.trials needs Optuna: pip install 'thrifty[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ranges = {"learning_rate": search.learning_rate} | ({"budget": search.budget} if search.budget else {})
    spaces = {
        name: optuna.distributions.FloatDistribution(range_.low, range_.high, log=True)
        for name, range_ in ranges.items()
        if isinstance(range_, Range)
    }
    sampler = optuna.samplers.TPESampler(seed=seed + 1000 * len(past), n_startup_trials=min(4, search.trials))
    study = optuna.create_study(sampler=sampler)
    worst = max([loss for _, loss in past if math.isfinite(loss)], default=1.0)
    for info, loss in past:
        values = {"learning_rate": info["learning_rate"], "budget": info.get("proposed_budget")}
        study.add_trial(
            optuna.trial.create_trial(
                params={name: values[name] for name in spaces},
                distributions=spaces,
                value=loss if math.isfinite(loss) else 2 * worst,
            )
        )
    params = study.ask(spaces).params
    return float(f"{params['learning_rate']:.3g}"), (float(f"{params['budget']:.3g}") if "budget" in params else None)
