"""WHEN the plan changes while a model trains."""

from .every import Every
from .most_changed import MostChanged
from .within_flops import WithinFlops

__all__ = ["Every", "MostChanged", "WithinFlops"]
