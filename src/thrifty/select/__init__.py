"""WHERE: scores and patterns -> regions."""

from .blocks import TopBlocks
from .inputs import Input, kept_inputs, same_inputs
from .probe import Probe, run_probe
from .whole import Everything

__all__ = ["Everything", "Input", "Probe", "TopBlocks", "kept_inputs", "run_probe", "same_inputs"]
