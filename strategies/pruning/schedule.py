"""How much is removed after which step: little by little, and then no more."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SparsitySchedule:
    """From `start` to `end` steps masks move every few steps; afterwards what is left recovers with masks as they are.

    After t steps the part 1 - (1 - (t - start) / (end - start))^3 of all that will be removed is removed (Zhu and
    Gupta, arXiv 1710.01878).
    """

    start: int
    end: int
    every: int

    @classmethod
    def of_run(cls, num_steps: int, prune_from: float, prune_until: float, every: int) -> SparsitySchedule:
        """By parts of a run; of one without steps nothing moves."""
        start = min(math.floor(prune_from * num_steps), max(0, num_steps - 1))
        return cls(start, min(num_steps, max(start + 1, round(prune_until * num_steps))), every)

    def moves(self, done: int) -> bool:
        """Whether masks move after so many steps."""
        inside = self.start < done <= self.end
        return inside and ((done - self.start) % self.every == 0 or done == self.end)

    def part(self, done: int) -> float:
        """The part that is removed after so many steps, at the end exactly 1."""
        way = (done - self.start) / (self.end - self.start)
        return 1 - (1 - min(1.0, max(0.0, way))) ** 3
