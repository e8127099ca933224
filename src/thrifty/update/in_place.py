"""The part that trains weights where they are."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.method import Selector

__all__ = ["InPlace"]


@dataclass(frozen=True, kw_only=True)
class InPlace:
    """Train the region itself, as an offset from its original values: no inference cost, an exact delta."""

    kind: str = "in_place"

    def selector(self, select: Selector) -> Selector:
        """`select` itself."""
        return select
