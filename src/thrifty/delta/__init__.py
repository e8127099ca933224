"""AFTER: the result of every method in one format."""

from .delta import Delta, Piece
from .digest import fingerprint

__all__ = ["Delta", "Piece", "fingerprint"]
