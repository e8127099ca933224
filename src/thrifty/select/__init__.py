"""WHERE: scores and patterns -> regions."""

from .blocks import TopBlocks
from .probe import Probe, run_probe
from .whole import Everything

__all__ = ["Everything", "Probe", "TopBlocks", "run_probe"]
