"""Calls in threads of their own, of which exactly one runs at a time: what they do together has one order.

A call gives its turn away by `wait`, and gets the next one when it is made `ready`.  Not more than `places` calls are
under way; the others begin as those end.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False)
class Turn:
    """One call: whether it may run, and how it is woken."""

    call: Callable[[Turn], None]
    is_ready: bool = True
    has_ended: bool = False
    error: BaseException | None = None
    _wake: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _returned: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _thread: threading.Thread | None = None

    def wait(self) -> None:
        """Inside the call: give the turn away until `ready`."""
        self.is_ready = False
        self._returned.release()
        self._wake.acquire()

    def ready(self) -> None:
        """Let it have another turn."""
        self.is_ready = True

    def run(self) -> None:
        """Give it the turn, until it gives it back or ends."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._in_thread, daemon=True)
            self._thread.start()
        else:
            self._wake.release()
        self._returned.acquire()

    def _in_thread(self) -> None:
        try:
            self.call(self)
        except BaseException as error:  # the caller of `take_turns` judges it
            self.error = error
        finally:
            self.has_ended = True
            self._returned.release()


@dataclass
class Rounds:
    """Calls that take turns; more may come between rounds.

    `when_all_wait` runs where a round leaves nobody ready; who is to have another turn is made ready there.
    """

    places: int
    when_all_wait: Callable[[], None]
    _queue: deque[Turn] = field(default_factory=deque)
    _under_way: list[Turn] = field(default_factory=list)

    def add(self, call: Callable[[Turn], None]) -> Turn:
        """A call that begins as soon as there is a place."""
        turn = Turn(call)
        self._queue.append(turn)
        return turn

    def run(self) -> bool:
        """A turn for each call that is ready, and what follows when all wait; whether any call is left."""
        while self._queue and len(self._under_way) < self.places:
            self._under_way.append(self._queue.popleft())
        for turn in [turn for turn in self._under_way if turn.is_ready]:
            turn.run()
        if self._under_way and not any(turn.is_ready or turn.has_ended for turn in self._under_way):
            self.when_all_wait()
        self._under_way = [turn for turn in self._under_way if not turn.has_ended]
        return bool(self._queue or self._under_way)


def take_turns(calls: list[Callable[[Turn], None]], places: int, when_all_wait: Callable[[], None]) -> list[Turn]:
    """Run all calls to their ends; `when_all_wait` runs between turns and makes at least one of them ready.

    What a call raises is its turn's `error` and stops no other.
    """
    rounds = Rounds(places, when_all_wait)
    turns = [rounds.add(call) for call in calls]
    while rounds.run():
        pass
    return turns
