"""Intervals of 95 % for scores of a sample of answers: where the score of all such answers may lie.

Without scipy, which has both and takes a second to import: `status` shows them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

LEVEL = 0.95
_RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """A number and what it may be."""

    value: float
    low: float
    high: float


def of_share(hits: int, count: int) -> Interval:
    """A share of right answers, by Wilson's score (1927), which holds for few answers and near 0 and 1.

    https://doi.org/10.1080/01621459.1927.10502953
    """
    share, z2 = hits / count, NormalDist().inv_cdf((1 + LEVEL) / 2) ** 2
    middle, wide = share + z2 / (2 * count), math.sqrt(z2 * (share * (1 - share) + z2 / (4 * count)) / count)
    low, high = ((middle + side) / (1 + z2 / count) for side in (-wide, wide))
    return Interval(share, max(0.0, low), min(1.0, high))


def of_mean(scores: Sequence[float]) -> Interval:
    """A mean, by the percentiles of means of scores drawn again (Efron 1979); always the same draws.

    https://doi.org/10.1214/aos/1176344552
    """
    import numpy

    values = numpy.asarray(scores, dtype=float)
    mean = float(values.mean())
    if len(values) < 2 or (values == values[0]).all():
        return Interval(mean, mean, mean)
    draw, size = numpy.random.default_rng(0), len(values)
    means = [float(values[draw.integers(0, size, size)].mean()) for _ in range(_RESAMPLES)]
    low, high = numpy.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))


def of_scores(scores: Sequence[float]) -> Interval:
    """A mean of scores in [0, 1]: of right and wrong answers their share."""
    if set(scores) <= {0.0, 1.0}:
        return of_share(int(sum(scores)), len(scores))
    return of_mean(scores)
