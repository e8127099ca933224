"""The one error for users' mistakes, and the sentences that name the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["ThriftyError", "nearest", "unknown"]


class ThriftyError(ValueError):
    """A mistake that the user can mend. One line: what is wrong, where, and the fix. The command line exits with 2."""


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The valid name closest to `name`, or None where nothing is close."""
    by_lower = {n.lower().replace("-", "_"): n for n in names}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def unknown(kind: str, name: str, names: Iterable[str]) -> str:
    """The sentence for an unknown `name`: the nearest valid one, and all of them where they are few."""
    known = sorted(names)
    close = nearest(name, known)
    hint = f"; did you mean {close!r}?" if close else ""
    listed = f" (known: {', '.join(known)})" if len(known) <= 24 or not close else ""
    return f"unknown {kind} {name!r}{hint}{listed}"
