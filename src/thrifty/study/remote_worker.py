"""One run for a study elsewhere: `python -m thrifty.study.remote_worker SPEC.json RECORD.json FOLDER`.

As `thrifty.study.worker`, but once standard input is closed the run ends and removes SPEC's folder: the process that
started it is no more, and the study has the run made anew.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from pathlib import Path

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """The exit code of the run."""
    threading.Thread(target=_end_with_starter, args=(Path(arguments[0]).parent,), daemon=True).start()
    from .worker import main as make  # it loads torch, for longer than a study that is stopped should wait

    return make(arguments)


def _end_with_starter(place: Path) -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock would be held while Python ends
        pass
    shutil.rmtree(place, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
