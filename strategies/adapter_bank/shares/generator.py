"""Shares learned from a bank: what is known of a data set -> the bank's principal directions, map by map.

Each map's corrections span at most N directions; its principal ones follow exactly from their inner products, so a
correction is never formed.  Their coordinates are predicted by kernel ridge regression,

    s_m = U_m U_m^T (1/N + (I - 1/N) (K + l I)^-1 k(x)),       U_m (N, K) eigenvectors of the map's Gram matrix,

the smallest honest form of Text-to-LoRA (arXiv 2506.06105) and Drag-and-Drop LLMs (arXiv 2506.16406): those train a
network on hundreds of tasks.  Kernel, ridge l and the number of directions are those that reconstruct each adapter
best from the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy

from strategies.adapter_bank.evidence import Evidence
from strategies.adapter_bank.shares.distances import jensen_shannon_answers, jensen_shannon_parts, mmd

Kernel = Callable[[Evidence, Sequence[Evidence]], numpy.ndarray]
RIDGES = (0.01, 0.1, 1.0, 10.0)
DIRECTIONS = (2, 4, 8, 16, 32)


def embedding_kernel(query: Evidence, others: Sequence[Evidence]) -> numpy.ndarray:
    """Inner products of data sets' mean token embeddings, each less the mean of all and of length 1."""
    means = numpy.stack([one.sketch_KD.astype(numpy.float64).mean(0) for one in (query, *others)])
    centred = means - means[1:].mean(0)
    centred /= numpy.maximum(numpy.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    return centred[1:] @ centred[0]


def _of_distance(distance: Callable[[Evidence, Sequence[Evidence]], numpy.ndarray], width: float) -> Kernel:
    return lambda query, others: numpy.exp(-distance(query, others) / width)


KERNELS: dict[str, Kernel] = {
    "embedding": embedding_kernel,
    "answers": _of_distance(jensen_shannon_answers, 0.1),
    "parts": _of_distance(jensen_shannon_parts, 0.1),
    "mmd": _of_distance(mmd, 0.1),
}


@dataclass(frozen=True)
class FitSetting:
    """How a generator is fitted."""

    kernel: str
    ridge: float
    directions: int


@dataclass(frozen=True)
class Generator:
    """A fitted map from evidence to shares of each map; made of the bank's own evidence and inner products alone."""

    setting: FitSetting
    evidence: Sequence[Evidence]
    kernel_NN: numpy.ndarray
    directions: Mapping[str, numpy.ndarray]  # of each map: U (N, K)

    @classmethod
    def fit(
        cls, evidence: Sequence[Evidence], grams: Mapping[str, numpy.ndarray], setting: FitSetting, keep: Sequence[int]
    ) -> Generator:
        """Of those adapters of a bank at the places `keep`; `grams` are of all (N, N) by map."""
        chosen = [evidence[place] for place in keep]
        kernel = numpy.stack([KERNELS[setting.kernel](one, chosen) for one in chosen])
        return cls.of_kernel(chosen, (kernel + kernel.T) / 2, grams, setting, keep)

    @classmethod
    def of_kernel(
        cls,
        evidence: Sequence[Evidence],
        kernel_NN: numpy.ndarray,
        grams: Mapping[str, numpy.ndarray],
        setting: FitSetting,
        keep: Sequence[int],
    ) -> Generator:
        """`fit`, with the kernel's values known."""
        place = numpy.ix_(keep, keep)
        found = {name: principal(gram[place], setting.directions) for name, gram in grams.items()}
        return cls(setting, evidence, kernel_NN, found)

    def shares(self, query: Evidence) -> dict[str, numpy.ndarray]:
        """(N,) for each map, for what is known of a data set."""
        return self.shares_by(KERNELS[self.setting.kernel](query, self.evidence))

    def shares_by(self, kernel_N: numpy.ndarray) -> dict[str, numpy.ndarray]:
        """`shares`, by the kernel's values between a data set and those of the bank."""
        dual = dual_of(self.kernel_NN, kernel_N, self.setting.ridge)
        return {name: u_NK @ (u_NK.T @ dual) for name, u_NK in self.directions.items()}


def dual_of(kernel_NN: numpy.ndarray, kernel_N: numpy.ndarray, ridge: float) -> numpy.ndarray:
    """Shares before any direction is left out; they sum to 1: what the ridge takes away falls to all alike."""
    count = len(kernel_N)
    centre = numpy.eye(count) - 1 / count
    centred_NN = centre @ kernel_NN @ centre
    centred_N = centre @ (kernel_N - kernel_NN.mean(1))
    scale = max(float(numpy.trace(centred_NN)) / count, 1e-12)
    return 1 / count + centre @ numpy.linalg.solve(centred_NN + ridge * scale * numpy.eye(count), centred_N)


def principal(gram_NN: numpy.ndarray, count: int) -> numpy.ndarray:
    """Eigenvectors (N, K) of the largest inner products' eigenvalues: principal directions of stacked corrections."""
    values, vectors = numpy.linalg.eigh(gram_NN.astype(numpy.float64))
    kept = [place for place in numpy.argsort(-values)[:count] if values[place] > 1e-9 * max(values[-1], 1e-300)]
    return vectors[:, kept]


def reconstruction_error(gram_NN: numpy.ndarray, place: int, others: Sequence[int], shares: numpy.ndarray) -> float:
    """|| sum of the others by shares - adapter ||^2 of one map, by inner products."""
    across = gram_NN[place, others]
    return float(gram_NN[place, place] - 2 * shares @ across + shares @ gram_NN[numpy.ix_(others, others)] @ shares)


def errors_left_out(
    evidence: Sequence[Evidence], grams: Mapping[str, numpy.ndarray], kernels: Sequence[str] = tuple(KERNELS)
) -> dict[FitSetting, float]:
    """For each setting the share of all adapters' squares that is missed where each is made of the others.

    1 is what making nothing misses.
    """
    count, found = len(evidence), dict[FitSetting, float]()
    whole = sum(float(numpy.trace(gram)) for gram in grams.values())
    values = {name: numpy.stack([KERNELS[name](one, evidence) for one in evidence]) for name in kernels}
    for place in range(count):
        others = [other for other in range(count) if other != place]
        inside = numpy.ix_(others, others)
        duals = {
            (name, ridge): dual_of((k[inside] + k[inside].T) / 2, k[place, others], ridge)
            for name, k in values.items()
            for ridge in RIDGES
        }
        for gram in grams.values():
            most_NK = principal(gram[inside], max(DIRECTIONS))
            for (name, ridge), dual in duals.items():
                coordinates = most_NK.T @ dual
                for directions in DIRECTIONS:
                    shares = most_NK[:, :directions] @ coordinates[:directions]
                    setting = FitSetting(name, ridge, directions)
                    error = reconstruction_error(gram, place, others, shares)
                    found[setting] = found.get(setting, 0.0) + error / whole
    return found
