"""One run at a time in an `output_dir`."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from thrifty.core.errors import ThriftyError
from thrifty.core.files import disk_errors

__all__ = ["LOCK", "locked"]

LOCK = ".lock"
_log = logging.getLogger("thrifty")
_held: set[int] = set()


def _forget() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)  # else a data loader's process would hold the lock after the run's death


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` where it is missing, and keep other runs out of it until the block is left.

    The kernel's lock (flock) ends with the process that holds it, however it dies. Where a file system has none, a
    warning says so. What was made for the lock alone goes away with it. ThriftyError where another process holds it.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    with disk_errors(str(folder), fix="give another output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        handle = _take(folder)
    _held.add(handle)
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()  # before it is let go: whoever waits for it looks whether it is still there
        if handle in _held:  # not in a child that was forked meanwhile
            _held.remove(handle)
            os.close(handle)
        with suppress(OSError):  # not empty
            for place in missing:
                place.rmdir()


def _take(folder: Path) -> int:
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(handle, 300, 0).decode(errors="replace").strip() or "another process"
                raise ThriftyError(
                    f"output_dir: {str(folder)!r} is in use by {holder}: wait for its end, or give another one"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                _log.warning("%s: this file system has no locks: see to it that no other run uses the folder", folder)
                return handle
            if path.exists() and os.path.samestat(os.fstat(handle), os.stat(path)):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # it was removed by the run that held it
