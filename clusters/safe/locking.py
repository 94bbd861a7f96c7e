"""A lock on a file, by the system's own means: it is gone however its holder ends.

flock where the system has it; filelock does it on Windows, where jobs are planned and runs are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:
    fcntl = None


@contextmanager
def hold(file: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of `file`, which is made where it is not there, inside the block; whether it was taken.

    A file system that knows no locks counts as taken by another.  Raises OSError where the file cannot be opened.
    """
    if fcntl is None:
        with _hold_elsewhere(file, wait) as taken:
            yield taken
        return
    with file.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            taken = True
        except OSError:
            taken = False
        yield taken


@contextmanager
def _hold_elsewhere(file: Path, wait: bool) -> Iterator[bool]:
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        lock.acquire(timeout=-1 if wait else 0)
        taken = True
    except (Timeout, OSError):
        taken = False
    try:
        yield taken
    finally:
        lock.release()
