"""AFTER: the result of every method in one format."""

from .delta import Delta, Piece
from .digest import fingerprint
from .low_rank import LowRankPiece

__all__ = ["Delta", "LowRankPiece", "Piece", "fingerprint"]
