"""AFTER: the result of every method in one format."""

from .delta import Delta
from .digest import fingerprint
from .low_rank import LowRankPiece
from .piece import Piece
from .switch import Deltas
from .vocabulary import NewTokens, add_tokens

__all__ = ["Delta", "Deltas", "LowRankPiece", "NewTokens", "Piece", "add_tokens", "fingerprint"]
