"""HOW the leaves move, for methods that AdamW does not suit."""

from .muon import Muon

__all__ = ["Muon"]
