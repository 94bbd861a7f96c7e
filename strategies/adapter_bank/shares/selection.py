"""Shares moved on by labelled rows, without gradients: greedy forward selection.

    c <- (1 - step) c + step e_i

for the adapter i, or for none of them (more of the base model), that lowers the loss most, while it falls (Caruana et
al., Ensemble selection from libraries of models, ICML 2004; in the space of LoraHub, arXiv 2307.13269).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy

_STEPS = (0.4, 0.2)
_MOST_MOVES = 4
_LATER = 4  # of the first round's best, tried in later rounds


@dataclass(frozen=True)
class Selected:
    """Where the moves led."""

    weights: numpy.ndarray  # of the start, then of each adapter; what is missing to 1 is the base model's
    losses: tuple[float, ...]  # of the start, and after each move
    num_trials: int


def forward_selection(num_adapters: int, loss: Callable[[numpy.ndarray], float]) -> Selected:
    """`loss` is asked for weights of (the start, each adapter); at most 1 + adapters + 20 times or so."""
    everything = numpy.eye(1 + num_adapters)
    weights, targets = everything[0], numpy.vstack([everything[1:], numpy.zeros(1 + num_adapters)])
    losses, num_trials = [loss(weights)], 1
    for step in _STEPS:
        while len(losses) <= _MOST_MOVES:
            tried = (1 - step) * weights + step * targets
            found = [loss(one) for one in tried]
            num_trials += len(found)
            order = numpy.argsort(found, kind="stable")
            targets = targets[order[:_LATER]]
            if not found[order[0]] < losses[-1]:
                break
            weights = tried[order[0]]
            losses.append(found[order[0]])
    return Selected(weights, tuple(losses), num_trials)
