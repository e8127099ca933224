"""Budget: a ceiling on trained numbers."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from .errors import ThriftyError

__all__ = ["Budget", "distinct_parameters", "share_of"]


def distinct_parameters(model: nn.Module) -> int:
    """How many numbers the model holds: embeddings included, tied tensors counted once."""
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class Budget:
    """At most `fraction` of the model's distinct parameters, or at most `count` numbers; exactly one is set."""

    fraction: float | None = None
    count: int | None = None

    @classmethod
    def parse(cls, value: Budget | float | int | str) -> Budget:
        """A float in (0, 1] is a fraction, an integer >= 2 a count, "1%" a fraction. ThriftyError otherwise."""
        wrong = ThriftyError(
            f"budget {value!r} is neither a share (0.01 or '1%', above 0 and at most 1) "
            "nor a count (an integer of 2 or more)"
        )
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            text = value.strip()
            percent = re.fullmatch(r"([0-9.]+(?:[eE][-+]?\d+)?)\s*%", text)
            try:
                number = float(percent[1]) / 100 if percent else float(text.replace("_", ""))
            except ValueError:
                raise wrong from None
            if percent or not re.fullmatch(r"[0-9_]+", text):
                value = number
            else:
                value = int(number)
        if isinstance(value, bool):
            raise wrong
        if isinstance(value, int) and value >= 2:
            return cls(count=value)
        if isinstance(value, float | int) and 0 < value <= 1:
            return cls(fraction=float(value))
        if isinstance(value, float) and value >= 2 and value == int(value):
            return cls(count=int(value))
        raise wrong

    def numbers(self, model: nn.Module) -> int:
        """The ceiling for `model`, in numbers."""
        return self.of(distinct_parameters(model))

    def of(self, total: int) -> int:
        """The ceiling for a model of `total` numbers."""
        if self.count is not None:
            return self.count
        assert self.fraction is not None
        return int(self.fraction * total + 1e-9)

    def __str__(self) -> str:
        return f"{self.count:,} numbers" if self.count is not None else f"{100 * (self.fraction or 0):g}%"


def share_of(value: object, *, key: str) -> float:
    """A share written as `budget` writes one (0.1, "10%"), as a fraction in (0, 1]. ThriftyError naming `key`."""
    fraction = None
    if isinstance(value, float | int | str):
        with suppress(ThriftyError):
            fraction = Budget.parse(value).fraction
    if fraction is None:
        raise ThriftyError(f"{key} {value!r} is not a share: give 0.1 or '10%', above 0 and at most 1")
    return fraction
