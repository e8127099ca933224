"""Reward functions for GRPO: a built-in check, and the user's own Python."""

from __future__ import annotations

import functools
import importlib
import inspect
import numbers
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from thrifty.core.errors import ThriftyError, nearest

__all__ = ["exact_match", "reward_functions"]

Reward = Callable[..., Any]


def exact_match(completions: Sequence[Any], reference: Sequence[str], **_: Any) -> list[float]:
    """1 where a completion is the row's own `completion`, both stripped; else 0."""
    return [float(_text(given).strip() == right.strip()) for given, right in zip(completions, reference, strict=True)]


def reward_functions(names: Sequence[str]) -> list[Reward]:
    """`exact_match`, or `module:function`, which is imported, from the current directory too, and so runs its code.

    A function takes `prompts`, `completions` and every column of the rows as lists of equal length, the rows' own
    `completion` as `reference`, and returns one number (or None: no verdict) for each.
    """
    return [exact_match if name == "exact_match" else _imported(name) for name in names]


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _imported(name: str) -> Reward:
    module_name, _, function_name = name.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)  # as `python -m` has it
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks one of its own
        raise ThriftyError(
            f"reward_funcs: no module {error.name!r} for {name!r}, neither in {here} nor installed"
        ) from error
    finally:
        sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        close = nearest(function_name, [key for key, value in vars(module).items() if inspect.isfunction(value)])
        hint = f"; did you mean {close!r}?" if close else ""
        raise ThriftyError(f"reward_funcs: {module_name!r} has no function {function_name!r}{hint}")
    return function if inspect.iscoroutinefunction(function) else _checked(function, name)


def _checked(function: Reward, name: str) -> Reward:
    """`function`, whose answers are one number or None for each completion, or a ThriftyError."""

    @functools.wraps(function)
    def checked(*, completions: Sequence[Any], **given: Any) -> list[float | None]:
        rewards = function(completions=completions, **given)
        whole = list(rewards) if hasattr(rewards, "__iter__") else []
        if len(whole) != len(completions) or not all(r is None or isinstance(r, numbers.Real) for r in whole):
            raise ThriftyError(
                f"reward_funcs: {name} must return a list of {len(completions)} numbers, one for each completion"
            )
        return [None if r is None else float(r) for r in whole]

    checked.__name__ = getattr(function, "__name__", name)
    return checked
