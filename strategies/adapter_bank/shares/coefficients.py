"""Distances -> how much of each adapter: rows that sum to 1 (arXiv 2507.01806).

attentional  softmin(d / t); published with t = 1, by default here t = median / 5 of the row
normalised   softmin of the standardised row, the zero distance to itself counted in, as published
neural       softmin of a small network's score of the standardised distance, trained on the bank: each adapter is to
             be the sum of the others
"""

from __future__ import annotations

import numpy

_HIDDEN, _STEPS, _RATE = 64, 200, 1e-2


def softmin(distances: numpy.ndarray) -> numpy.ndarray:
    """exp(-d) over the sum of those of its row; an infinite distance gets nothing."""
    weights = numpy.exp(-(distances - distances.min(-1, keepdims=True)))
    return weights / weights.sum(-1, keepdims=True)


def attentional(distances: numpy.ndarray, temperature: float | None = None) -> numpy.ndarray:
    """`temperature` None = a fifth of the row's median, so that near data sets count and far ones hardly do."""
    finite = numpy.where(numpy.isfinite(distances), distances, numpy.nan)
    scale = numpy.nanmedian(finite, axis=-1, keepdims=True) / 5 if temperature is None else numpy.array(temperature)
    return softmin(distances / numpy.maximum(scale, 1e-12))


def normalised(distances: numpy.ndarray, temperature: float | None = None) -> numpy.ndarray:
    return softmin(standardised(distances) / (temperature or 1.0))


def standardised(distances: numpy.ndarray) -> numpy.ndarray:
    """Each row less its mean, over its standard deviation, both with the distance 0 to itself; inf stays inf."""
    known = numpy.where(numpy.isfinite(distances), distances, numpy.nan)
    count = numpy.isfinite(distances).sum(-1, keepdims=True) + 1
    mean = numpy.nansum(known, -1, keepdims=True) / count
    square = numpy.nansum((known - mean) ** 2, -1, keepdims=True) + mean**2
    return (distances - mean) / numpy.maximum(numpy.sqrt(square / count), 1e-12)


class Scorer:
    """phi: a standardised distance -> a score, its softmin the coefficients.

    Trained on the bank without its data or gradients of the model:

        || sum c_j dW_j - dW_i ||^2 = c G c - 2 c G_i + G_ii,  G the inner products of the bank's corrections.

    Published are two hidden layers of 4,000, on flattened factors.
    """

    def __init__(self, distances_NN: numpy.ndarray, gram_NN: numpy.ndarray, seed: int = 0) -> None:
        """Of a bank: the diagonal is not looked at, no adapter is made of itself."""
        import torch

        off = numpy.where(numpy.eye(len(distances_NN), dtype=bool), numpy.inf, distances_NN)
        there = torch.tensor(numpy.isfinite(off))
        inputs = torch.tensor(numpy.where(numpy.isfinite(off), standardised(off), 0.0), dtype=torch.float32)
        gram = torch.tensor(gram_NN, dtype=torch.float32)
        gram = gram / gram.diagonal().mean()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._network = torch.nn.Sequential(
                torch.nn.Linear(1, _HIDDEN),
                torch.nn.ReLU(),
                torch.nn.Linear(_HIDDEN, _HIDDEN),
                torch.nn.ReLU(),
                torch.nn.Linear(_HIDDEN, 1),
            )
        optimizer = torch.optim.Adam(self._network.parameters(), _RATE)
        for _ in range(_STEPS):
            scores = self._network(inputs[..., None])[..., 0].masked_fill(~there, torch.inf)
            c = torch.softmax(-scores, -1)
            loss = ((c @ gram * c).sum(-1) - 2 * (c * gram).sum(-1) + gram.diagonal()).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def __call__(self, distances: numpy.ndarray, temperature: float | None = None) -> numpy.ndarray:
        import torch

        standard = numpy.where(numpy.isfinite(distances), standardised(distances), 0.0)
        with torch.no_grad():
            scores = self._network(torch.tensor(standard, dtype=torch.float32)[..., None])[..., 0].numpy()
        return softmin(numpy.where(numpy.isfinite(distances), scores, numpy.inf) / (temperature or 1.0))
