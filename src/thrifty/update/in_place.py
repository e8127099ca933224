"""The part that trains weights where they are."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["InPlace"]


@dataclass(frozen=True, kw_only=True)
class InPlace:
    """Train the region itself, as an offset from its original values: no inference cost, an exact delta."""

    kind: str = "in_place"
