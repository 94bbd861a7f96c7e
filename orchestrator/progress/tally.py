"""How fast a phase goes, and what is left of it."""

from __future__ import annotations

from orchestrator.progress.updates import ProgressUpdate


class Tally:
    """A phase from the moment it was first heard of; its pace is measured from there on."""

    def __init__(self, update: ProgressUpdate, time: float) -> None:
        self.latest = update
        self._first = self._last = time, update.done  # seconds since the epoch, what was done then

    def continues(self, update: ProgressUpdate) -> bool:
        """Whether it is of this phase, not of the next one of its name."""
        return update.phase == self.latest.phase and update.done >= self.latest.done

    def add(self, update: ProgressUpdate, time: float) -> None:
        self.latest, self._last = update, (time, update.done)

    @property
    def rate(self) -> float | None:
        """Units a second; None while nothing was seen to be done."""
        seconds, done = self._last[0] - self._first[0], self._last[1] - self._first[1]
        return done / seconds if seconds > 0 and done > 0 else None

    @property
    def left_s(self) -> float | None:
        """At this pace; None where the pace or the end is not known."""
        if not self.rate or self.latest.total is None:
            return None
        return max(0.0, self.latest.total - self.latest.done) / self.rate
