"""Intervals of 95 % for scores of a sample of answers: where the score of all such answers may lie.

Without scipy, which has both and takes a second to import: `status` shows them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist, fmean

LEVEL = 0.95


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
    """A mean, by Student's t (1908): the spread of few scores is itself uncertain, which resampling them leaves out.

    https://doi.org/10.1093/biomet/6.1.1
    """
    mean, count = fmean(scores), len(scores)
    if count < 2 or min(scores) == max(scores):
        return Interval(mean, mean, mean)
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / (count - 1))
    wide = t_quantile(count - 1) * deviation / math.sqrt(count)
    return Interval(mean, mean - wide, mean + wide)


@cache
def t_quantile(degrees: int) -> float:
    """What Student's t of so many degrees of freedom stays below, on both sides, in 95 % of all samples.

    Hill, Algorithm 396 (1970), within 1e-5 of it.  https://doi.org/10.1145/355598.355599
    """
    outside = 1 - LEVEL
    if degrees == 1:
        return 1 / math.tan(outside * math.pi / 2)
    if degrees == 2:
        return math.sqrt(2 / (outside * (2 - outside)) - 2)
    n = float(degrees)
    a = 1 / (n - 0.5)
    b = (48 / a) / a
    c = ((20700 * a / b - 98) * a - 16) * a + 96.36
    d = ((94.5 / (b + c) - 3) / b + 1) * math.sqrt(a * math.pi / 2) * n
    y = (d * outside) ** (2 / n)
    if y > 0.05 + a:
        x = NormalDist().inv_cdf(outside / 2)
        y = x * x
        if n < 5:
            c += 0.3 * (n - 4.5) * (x + 0.6)
        c = (((0.05 * d * x - 5) * x - 7) * x - 2) * x + b + c
        y = (((((0.4 * y + 6.3) * y + 36) * y + 94.5) / c - y - 3) / b + 1) * x
        y = math.expm1(a * y * y)
    else:
        y = ((1 / (((n + 6) / (n * y) - 0.089 * d - 0.822) * (n + 2) * 3) + 0.5 / (n + 4)) * y - 1) * (n + 1)
        y = y / (n + 2) + 1 / ((d * outside) ** (2 / n))
    return math.sqrt(n * y)


def of_scores(scores: Sequence[float]) -> Interval:
    """A mean of scores in [0, 1]: of right and wrong answers their share."""
    if set(scores) <= {0.0, 1.0}:
        return of_share(int(sum(scores)), len(scores))
    found = of_mean(scores)
    return Interval(found.value, max(0.0, found.low), min(1.0, found.high))
