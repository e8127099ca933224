"""The named methods: one file each, a composition of parts. Importing this package registers them."""

from . import (
    bitfit,
    custom,
    diablo,
    full,
    gps,
    lift,
    locft_bf,
    magnitude,
    peft,
    random_blocks,
    random_columns,
    random_entries,
    random_rows,
    smt,
    telly,
)

__all__ = [
    "bitfit",
    "custom",
    "diablo",
    "full",
    "gps",
    "lift",
    "locft_bf",
    "magnitude",
    "peft",
    "random_blocks",
    "random_columns",
    "random_entries",
    "random_rows",
    "smt",
    "telly",
]
