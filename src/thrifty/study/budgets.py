"""Budgets of a study: a share of the model, a count, bytes on disk, or what a method takes by itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from thrifty.core.budget import Budget
from thrifty.core.errors import ThriftyError

__all__ = ["OWN", "StudyBudget"]

OWN = "own"
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class StudyBudget:
    """Exactly one of `fraction`, `count`, `size` (bytes of the result on disk) is set; none for a method's own size."""

    label: str  # in tables
    fraction: float | None = None
    count: int | None = None
    size: int | None = None

    @classmethod
    def parse(cls, value: Any) -> StudyBudget:
        """ "1%", 0.01, 250000, "5MB" or "own". ThriftyError otherwise."""
        if value is None or value == OWN:
            return cls(OWN)
        text = str(value).replace(" ", "")
        size = re.fullmatch(r"([0-9.]+)([KMG]?i?B)", text, re.IGNORECASE)
        if size:
            return cls(text, size=int(float(size[1]) * _UNITS[size[2].upper()]))
        try:
            budget = Budget.parse(value)
        except ThriftyError as error:
            raise ThriftyError(f"{error}, nor a size of the result ('5MB'), nor 'own'") from None
        if budget.count is not None:
            return cls(str(budget.count), count=budget.count)
        return cls(f"{100 * (budget.fraction or 0):g}%", fraction=budget.fraction)

    @property
    def word(self) -> str:
        """As part of a file's name."""
        return self.label.replace("%", "pct")
