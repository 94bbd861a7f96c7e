"""How fast a phase goes, and what is left of it."""

from __future__ import annotations

from orchestrator.progress.reached import Reached


class Tally:
    """A phase from the moment it was first heard of; its pace is measured from there on."""

    def __init__(self, reached: Reached, time: float) -> None:
        self.reached = reached
        self._first = self._last = time, reached.done  # seconds since the epoch, what was done then

    def continues(self, reached: Reached) -> bool:
        """Whether it is this phase that goes on, not the next one of its name."""
        return reached.phase == self.reached.phase and reached.done >= self.reached.done

    def add(self, reached: Reached, time: float) -> None:
        self.reached, self._last = reached, (time, reached.done)

    @property
    def rate(self) -> float | None:
        """Units a second; None while nothing was seen to be done."""
        seconds, done = self._last[0] - self._first[0], self._last[1] - self._first[1]
        return done / seconds if seconds > 0 and done > 0 else None

    @property
    def left_s(self) -> float | None:
        """At this pace; None where the pace or the end is not known."""
        if not self.rate or self.reached.total is None:
            return None
        return max(0.0, self.reached.total - self.reached.done) / self.rate
