"""The named methods: one file each, a composition of parts. Importing this package registers them."""

from . import full, peft, random_blocks, smt

__all__ = ["full", "peft", "random_blocks", "smt"]
