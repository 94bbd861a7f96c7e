"""How far a data set is from others: functions of one Evidence and many, giving one number each.

`wasserstein_ids` is the published distance on token numbers, whose order means nothing; it is here to be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy

from strategies.adapter_bank.evidence import SMOOTHING, Evidence, TokenCounts

_DIRECTIONS, _QUANTILES = 64, 64  # of the sliced distance
Distance = Callable[[Evidence, Sequence[Evidence]], numpy.ndarray]


def jensen_shannon(query: Evidence, others: Sequence[Evidence]) -> numpy.ndarray:
    """Jensen-Shannon divergence of all tokens' densities, in nats: 0 .. ln 2."""
    return _each(query, others, lambda one: one.tokens, _js)


def jensen_shannon_answers(query: Evidence, others: Sequence[Evidence]) -> numpy.ndarray:
    """The same of what is learnt alone."""
    return _each(query, others, lambda one: one.answers, _js)


def jensen_shannon_parts(query: Evidence, others: Sequence[Evidence]) -> numpy.ndarray:
    """Mean of both: alike in what is asked and in what is answered."""
    return (jensen_shannon(query, others) + jensen_shannon_answers(query, others)) / 2


def kullback_leibler(query: Evidence, others: Sequence[Evidence]) -> numpy.ndarray:
    """KL(query | other) of all tokens' densities, in nats."""
    return _each(query, others, lambda one: one.tokens, _kl)


def wasserstein_ids(query: Evidence, others: Sequence[Evidence]) -> numpy.ndarray:
    """1-Wasserstein distance of token numbers on the line: the integral of |F - G|."""
    own = query.tokens.density(query.vocabulary)
    densities = (other.tokens.density(query.vocabulary) for other in others)
    return numpy.array([float(numpy.abs(numpy.cumsum(own - density)).sum()) for density in densities])


def sliced_wasserstein(query: Evidence, others: Sequence[Evidence]) -> numpy.ndarray:
    """Root mean square over random directions of embeddings' 1-D 2-Wasserstein distance (Bonneel et al., 2015)."""
    directions = numpy.random.default_rng(0).standard_normal((query.sketch_KD.shape[1], _DIRECTIONS))
    directions /= numpy.linalg.norm(directions, axis=0)
    levels = (numpy.arange(_QUANTILES) + 0.5) / _QUANTILES

    def quantiles(one: Evidence) -> numpy.ndarray:
        return numpy.quantile(one.sketch_KD.astype(numpy.float32) @ directions, levels, axis=0)

    own = quantiles(query)
    return numpy.array([float(numpy.sqrt(((own - quantiles(other)) ** 2).mean())) for other in others])


def mmd(query: Evidence, others: Sequence[Evidence]) -> numpy.ndarray:
    """Maximum mean discrepancy of embeddings, Gaussian kernel with the median heuristic (Gretton et al., 2012)."""
    own = query.sketch_KD.astype(numpy.float32)
    sketches = [other.sketch_KD.astype(numpy.float32) for other in others]
    sample = numpy.concatenate([own, *(sketch[:: max(1, len(sketch) // 8)] for sketch in sketches)])
    between = _squares(sample, sample)
    width = float(numpy.median(between[between > 0])) if (between > 0).any() else 1.0

    def kernel(x: numpy.ndarray, y: numpy.ndarray) -> float:
        return float(numpy.exp(-_squares(x, y) / width).mean())

    inside = kernel(own, own)
    squares = [inside + kernel(other, other) - 2 * kernel(own, other) for other in sketches]
    return numpy.sqrt(numpy.maximum(squares, 0.0))


DISTANCES: dict[str, Distance] = {
    "js_parts": jensen_shannon_parts,
    "js": jensen_shannon,
    "js_answers": jensen_shannon_answers,
    "kl": kullback_leibler,
    "wasserstein_ids": wasserstein_ids,
    "sliced_wasserstein": sliced_wasserstein,
    "mmd": mmd,
}


def _each(
    query: Evidence,
    others: Sequence[Evidence],
    part: Callable[[Evidence], TokenCounts],
    distance: Callable[[numpy.ndarray, numpy.ndarray, numpy.ndarray], float],
) -> numpy.ndarray:
    """Over the tokens that occur in any of the data sets; all others, which are alike in all, count as one."""
    counts = [part(one) for one in (query, *others)]
    ids = numpy.unique(numpy.concatenate([one.ids for one in counts]))
    number = numpy.ones(len(ids) + 1)  # tokens that an entry stands for
    number[-1] = query.vocabulary - len(ids)
    own, *densities = (_density(one, ids, query.vocabulary) for one in counts)
    return numpy.array([distance(own, density, number) for density in densities])


def _density(counts: TokenCounts, ids: numpy.ndarray, vocabulary: int) -> numpy.ndarray:
    """`TokenCounts.density` of some tokens, and at the end that of a token that does not occur."""
    found = numpy.full(len(ids) + 1, SMOOTHING / vocabulary)
    found[numpy.searchsorted(ids, counts.ids)] += counts.counts
    return found / (counts.counts.sum(dtype=float) + SMOOTHING)


def _kl(p: numpy.ndarray, q: numpy.ndarray, number: numpy.ndarray) -> float:
    return float((number * p * numpy.log(p / q)).sum())


def _js(p: numpy.ndarray, q: numpy.ndarray, number: numpy.ndarray) -> float:
    middle = (p + q) / 2
    return (_kl(p, middle, number) + _kl(q, middle, number)) / 2


def _squares(x: numpy.ndarray, y: numpy.ndarray) -> numpy.ndarray:
    return numpy.maximum((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T, 0.0)
