"""How each step is divided among the workers.  Pure arithmetic on numbers that all have, so all decide the same.

A share changes how long a step takes, never what it computes: the samples of a step are fixed, gradients are summed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

_REMEMBERED = 3  # steps whose median is a worker's pace: one slow step is not yet a slow worker
_GAIN = 1.10  # a step must become so much faster ...
_PATIENCE = 2  # ... by what so many steps in a row have shown


@dataclass
class Shares:
    """Shares of a group's workers, by rank; they follow the measured pace when that pays."""

    shares: list[float]
    is_fixed: bool = False  # whatever is measured
    _paces: list[list[float]] = field(default_factory=list)  # seconds a token, the newest last
    _better: int = 0

    def __post_init__(self) -> None:
        self._paces = self._paces or [[] for _ in self.shares]

    @classmethod
    def choose(cls, planned: Sequence[float], tokens_per_s: Sequence[float]) -> Shares:
        """The planned shares, or those of the measured speeds where that makes steps at least 10 % shorter."""
        measured = cls.by_speed(tokens_per_s)
        now = max(share / speed for share, speed in zip(planned, tokens_per_s, strict=True))
        if now > _GAIN / sum(tokens_per_s):
            return measured
        return cls(list(planned), _paces=measured._paces)

    @classmethod
    def by_speed(cls, tokens_per_s: Sequence[float]) -> Shares:
        """In proportion to speed."""
        total = sum(tokens_per_s)
        return cls([speed / total for speed in tokens_per_s], _paces=[[1 / speed] for speed in tokens_per_s])

    def observe(self, tokens: Sequence[int], seconds: Sequence[float]) -> bool:
        """Take in what each worker did in a step; True when the shares were changed.

        They change when the pace of several steps promises steps at least 10 % shorter: less would be noise, and a
        share that follows every step follows its own errors.
        """
        for known, count, took in zip(self._paces, tokens, seconds, strict=True):
            if count:
                known.append(took / count)
                del known[:-_REMEMBERED]
        if self.is_fixed or not all(self._paces):
            return False
        paces = [statistics.median_low(known) for known in self._paces]
        now = max(share * pace for share, pace in zip(self.shares, paces, strict=True))
        best = 1 / sum(1 / pace for pace in paces)
        self._better = self._better + 1 if now > _GAIN * best else 0
        if self._better < _PATIENCE:
            return False
        self.shares = [best / pace for pace in paces]
        self._better = 0
        return True

    @property
    def slowest(self) -> int:
        """The rank that the others wait for, by the last step."""
        waits = [share * (known[-1] if known else 0.0) for share, known in zip(self.shares, self._paces, strict=True)]
        return max(range(len(waits)), key=waits.__getitem__)
