"""A call in a thread of its own, so that the main thread can watch it and receive Ctrl-C; a module that loads ahead."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence

_POLL_S = 0.2


def run_in_background(
    call: Callable[[], None], poll: Callable[[], None], interrupt: Callable[[], None]
) -> BaseException | None:
    """Run `call` to its end and return what it raised; `poll` is called meanwhile, `interrupt` at every Ctrl-C.

    What `poll` and `interrupt` raise ends the wait; the thread is a daemon.
    """
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            call()
        except BaseException as error:  # the main thread judges it
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, daemon=True).start()
    while True:
        try:
            # Not Thread.join, which takes the thread for ended when Ctrl-C interrupts it.
            if done.wait(_POLL_S):
                return errors[0] if errors else None
            poll()
        except KeyboardInterrupt:
            interrupt()


def run_side_by_side(calls: Sequence[Callable[[], None]]) -> list[BaseException | None]:
    """Run the calls to their ends, each in a thread; what each raised."""
    errors: list[BaseException | None] = [None] * len(calls)

    def run(place: int) -> None:
        try:
            calls[place]()
        except BaseException as error:  # the caller judges it
            errors[place] = error

    others = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(1, len(calls))]
    for thread in others:
        thread.start()
    run(0)
    for thread in others:
        thread.join()
    return errors


def load_in_background(load: Callable[[], object]) -> None:
    """Import in a thread what takes seconds, while others are waited for; what fails is said where it is used."""

    def run() -> None:
        with contextlib.suppress(ImportError):
            load()

    threading.Thread(target=run, daemon=True).start()
