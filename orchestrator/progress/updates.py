"""`report` says how far work has come; who shows it surrounds the work with `reporting_to`.

What works has no watcher among its arguments: reading rows, fetching files and measuring a model are called from many
places, most of which show nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class ProgressUpdate:
    """How far a phase has come."""

    phase: str  # download | tokenising | evaluation | answers | saving
    done: float
    total: float | None = None  # None where nobody knows
    unit: str = "rows"  # or bytes, prompts, files


Listener = Callable[[ProgressUpdate], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def report(phase: str, done: float, total: float | None = None, unit: str = "rows") -> None:
    """Report to the listener; costs nothing where there is none."""
    if listen := _listener.get():
        listen(ProgressUpdate(phase, done, total, unit))


def listener() -> Listener | None:
    """Who listens here, for threads: they begin without."""
    return _listener.get()


@contextmanager
def reporting_to(listen: Listener) -> Iterator[None]:
    """What is reported inside the block goes to `listen`."""
    token = _listener.set(listen)
    try:
        yield
    finally:
        _listener.reset(token)


def every(seconds: float, listen: Listener) -> Listener:
    """A listener that passes on what comes at least so long after it was made, or after what it passed on last."""
    last = time.monotonic()

    def heard(update: ProgressUpdate) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= seconds:
            last = now
            listen(update)

    return heard
