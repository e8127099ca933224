"""Fine-tune language models at the lowest cost: train the part of the model that pays."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thrifty.core.budget import Budget
    from thrifty.core.method import Method
    from thrifty.core.plan import Plan
    from thrifty.core.registry import records as methods
    from thrifty.delta import Delta, Deltas, add_tokens
    from thrifty.run.estimate import estimate
    from thrifty.run.train import train
    from thrifty.study.compare import compare
    from thrifty.update.tuning import attach

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "Delta",
    "Deltas",
    "Method",
    "Plan",
    "add_tokens",
    "attach",
    "compare",
    "estimate",
    "methods",
    "train",
]

# Loaded on first use, so that `import thrifty` and `thrifty --help` load neither torch nor transformers.
_HOMES = {
    "Budget": ("thrifty.core.budget", "Budget"),
    "Delta": ("thrifty.delta", "Delta"),
    "Deltas": ("thrifty.delta", "Deltas"),
    "Method": ("thrifty.core.method", "Method"),
    "Plan": ("thrifty.core.plan", "Plan"),
    "add_tokens": ("thrifty.delta", "add_tokens"),
    "attach": ("thrifty.update.tuning", "attach"),
    "compare": ("thrifty.study.compare", "compare"),
    "estimate": ("thrifty.run.estimate", "estimate"),
    "methods": ("thrifty.core.registry", "records"),
    "train": ("thrifty.run.train", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'thrifty' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
