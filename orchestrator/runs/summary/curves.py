"""A curve of bounded size that keeps every peak, and a set of steps as ranges."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Self

_MOST_EXACT = 4000  # steps that are kept one by one; a page is drawn a thousand dots wide
_MOST_BUCKETS = 2000
_Bucket = list[Any]  # [step, lowest, step, highest, step of the first NaN or None]


class StepCurve:
    """Values by step, the last of each step.

    Beyond 4,000 steps the lowest and the highest value of every `width` steps: a power of two.  There, a step that
    comes again takes the place of what its bucket held from that step on.  Adding in pieces gives the same curve.
    """

    def __init__(self) -> None:
        self.width = 1
        self._exact: dict[int, float] = {}
        self._buckets: dict[int, _Bucket] = {}  # number -> bucket, once the width is above 1

    def add(self, step: int, value: float) -> None:
        if self.width == 1:
            self._exact[step] = value
            if len(self._exact) > _MOST_EXACT:
                self._condense()
            return
        number = step // self.width
        bucket = self._buckets.get(number)
        if bucket is None:
            self._buckets[number] = _bucket(step, value)
            while len(self._buckets) > _MOST_BUCKETS:
                self._widen()
        elif bucket[1] <= value <= bucket[3] and step > bucket[0] and step > bucket[2] and bucket[4] is None:
            return  # the usual case, at once
        else:
            self._buckets[number] = _joined([one for one in _points(bucket) if one[0] < step], [(step, value)])

    def points(self) -> list[tuple[int, float]]:
        """(step, value) by step."""
        if self.width == 1:
            return sorted(self._exact.items())
        return [point for _, bucket in sorted(self._buckets.items()) for point in _points(bucket)]

    def _condense(self) -> None:
        self.width = 2
        exact, self._exact = self._exact, {}
        for step, value in sorted(exact.items()):
            self._put(step // 2, [(step, value)])
        while len(self._buckets) > _MOST_BUCKETS:
            self._widen()

    def _widen(self) -> None:
        self.width *= 2
        buckets, self._buckets = self._buckets, {}
        for number, bucket in sorted(buckets.items()):
            self._put(number // 2, _points(bucket))

    def _put(self, number: int, points: Sequence[tuple[int, float]]) -> None:
        known = self._buckets.get(number)
        self._buckets[number] = _joined(_points(known) if known else [], points)

    def to_json(self) -> dict[str, Any]:
        return {"width": self.width, "points": self.points()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Raises ValueError, TypeError or LookupError for what `to_json` did not write."""
        made = cls()
        made.width = int(values["width"])
        for step, value in values["points"]:
            if made.width == 1:
                made._exact[step] = value
            else:
                made._put(step // made.width, [(step, value)])
        return made


def _bucket(step: int, value: float) -> _Bucket:
    return [step, value, step, value, None] if value == value else [step, math.inf, step, -math.inf, step]


def _points(bucket: _Bucket) -> list[tuple[int, float]]:
    """The points that a bucket keeps, by step."""
    low, lowest, high, highest, no_number = bucket
    found = {}
    if lowest <= highest:
        found = {low: lowest, high: highest}
    if no_number is not None:
        found[no_number] = math.nan
    return sorted(found.items())


def _joined(before: Sequence[tuple[int, float]], after: Sequence[tuple[int, float]]) -> _Bucket:
    """A bucket of points by step; of equal values the first stays."""
    points = [*before, *after]
    numbers = [point for point in points if point[1] == point[1]]  # not math.isnan: of any size
    no_number = next((step for step, value in points if value != value), None)
    if not numbers:
        return [no_number, math.inf, no_number, -math.inf, no_number]
    low, high = min(numbers, key=lambda point: point[1]), max(numbers, key=lambda point: point[1])
    return [*low, *high, no_number]


class StepSet:
    """A set of whole numbers as ranges: of steps that were trained in order, one."""

    def __init__(self, ranges: Sequence[Sequence[int]] = ()) -> None:
        self._first = [int(first) for first, _ in ranges]
        self._last = [int(last) for _, last in ranges]

    def add(self, step: int) -> bool:
        """Whether it is new."""
        first, last = self._first, self._last
        if last and last[-1] + 1 == step:  # the usual case, at once
            last[-1] = step
            return True
        place = bisect_right(first, step)  # of the range that begins after it
        if place and step <= last[place - 1]:
            return False
        touches_left = place > 0 and last[place - 1] + 1 == step
        touches_right = place < len(first) and first[place] == step + 1
        if touches_left and touches_right:
            last[place - 1] = last.pop(place)
            first.pop(place)
        elif touches_left:
            last[place - 1] = step
        elif touches_right:
            first[place] = step
        else:
            first.insert(place, step)
            last.insert(place, step)
        return True

    def __len__(self) -> int:
        return sum(last - first + 1 for first, last in zip(self._first, self._last, strict=True))

    def to_json(self) -> list[list[int]]:
        return [[first, last] for first, last in zip(self._first, self._last, strict=True)]
