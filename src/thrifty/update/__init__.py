"""WHAT is trained: trainable parts put in place of a module, or on a parameter."""

from .tuning import Tuning, attach, attach_with

__all__ = ["Tuning", "attach", "attach_with"]
