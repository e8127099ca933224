"""What checking a run found: facts by section, problems and warnings together at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from thrifty.core.errors import ThriftyError

__all__ = ["Report"]


class Report:
    """Prints facts as they are found; keeps problems (to be mended before training) and warnings (odd, but allowed).

    Without a console nothing is printed.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = Console(quiet=True) if console is None else console
        self.facts: list[str] = []
        self.problems: list[str] = []
        self.warnings: list[str] = []

    @property
    def is_clean(self) -> bool:
        """Whether a run can start."""
        return not self.problems

    def section(self, title: str) -> None:
        """What follows is about `title`."""
        self._print(Text(title, style="bold"))

    def say(self, text: str | Text) -> None:
        """A fact, on lines of their own."""
        self.facts.append(str(text))
        for line in Text(text).split("\n") if isinstance(text, str) else text.split("\n"):
            self._print(Text("  ").append_text(line))

    def problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """A ThriftyError inside the block is a problem, and ends the block."""
        try:
            yield
        except ThriftyError as error:
            self.problem(str(error))

    def close(self, *, ready: str) -> None:
        """All problems and warnings, or that there are none; `ready` is what to do then."""
        for found, what, style in ((self.problems, "problem", "red"), (self.warnings, "warning", "yellow")):
            if found:
                self._print(Text(f"{len(found)} {what}{'s' if len(found) > 1 else ''}", style=f"bold {style}"))
            for text in found:
                self._print(Text(f"  {what}: ", style=style).append(text, style="default"))
        if self.is_clean:
            self._print(Text(f"no problems; {ready}", style="green"))

    def _print(self, text: Text) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
