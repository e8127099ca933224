"""AFTER: the result of every method in one format."""

from .delta import Delta, Piece
from .files import fingerprint, whole_folder

__all__ = ["Delta", "Piece", "fingerprint", "whole_folder"]
