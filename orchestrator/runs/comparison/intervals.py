"""Intervals of 95 % for scores of a sample of answers: where the score of all such answers may lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    from scipy.stats import binomtest

    found = binomtest(hits, count).proportion_ci(LEVEL, method="wilson")
    return Interval(hits / count, float(found.low), float(found.high))


def of_mean(scores: Sequence[float]) -> Interval:
    """A mean, by the percentiles of means of scores drawn again (Efron 1979); always the same draws.

    https://doi.org/10.1214/aos/1176344552
    """
    import numpy
    from scipy.stats import bootstrap

    values = numpy.asarray(scores, dtype=float)
    mean = float(values.mean())
    if len(values) < 2 or (values == values[0]).all():
        return Interval(mean, mean, mean)
    found = bootstrap(
        (values,),
        numpy.mean,
        n_resamples=_RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=numpy.random.default_rng(0),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def of_scores(scores: Sequence[float]) -> Interval:
    """A mean of scores in [0, 1]: of right and wrong answers their share."""
    if set(scores) <= {0.0, 1.0}:
        return of_share(int(sum(scores)), len(scores))
    return of_mean(scores)
