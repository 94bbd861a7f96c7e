"""How fast a run trains by the clock."""

from __future__ import annotations

from typing import Any, Self

_ENOUGH_STEPS = 3  # after the first, which is often the slowest


class StepPace:
    """Seconds of a step of one sitting, evaluations and checkpoints between steps included."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None  # step, time
        self._last: tuple[int, float] | None = None

    def add(self, step: int, time: float) -> None:
        self._first = self._first or (step, time)
        self._last = (step, time)

    @property
    def step_s(self) -> float | None:
        """None while fewer than three steps follow the first one."""
        if not self._first or not self._last or self._last[0] - self._first[0] < _ENOUGH_STEPS:
            return None
        return max(0.0, self._last[1] - self._first[1]) / (self._last[0] - self._first[0])

    def to_json(self) -> list[Any]:
        return [self._first, self._last]

    @classmethod
    def from_json(cls, values: list[Any]) -> Self:
        made = cls()
        made._first, made._last = (one and (int(one[0]), one[1]) for one in values)
        return made
