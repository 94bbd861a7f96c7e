"""Local steps: workers train alone for several steps, then average what they changed (DiLoCo, arXiv 2311.08105).

One sum for many steps, for networks on which a sum a step is too dear.  It is another computation than the synchronous
one, with its own convergence, so a job has to ask for it (strategy.local_steps).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from strategies.train_setup import TrainSetup

_OUTER_RATE, _OUTER_MOMENTUM = 0.7, 0.9  # Nesterov's, as the paper found best
_MOMENTUM = "outer_momentum"


class LocalSteps:
    """The weights that all workers had in common last, and the outer optimizer that moves them.

    What a worker changed travels where gradients do, so it is summed, bucketed and counted like them.  The outer
    momentum lies among the inner optimizer's states, so a checkpoint holds it with them.
    """

    def __init__(self, setup: TrainSetup, batch_size: int) -> None:
        self._batch_size = batch_size  # samples of a local step
        self._parameters = list(setup.parameters.values())
        self._state = setup.optimizer.state
        self._common = [parameter.detach().clone() for parameter in self._parameters]

    def split(self, own: Sequence[int]) -> list[Sequence[int]]:
        """The samples of each local step: a worker with a larger share makes more steps of the same size."""
        return [own[start : start + self._batch_size] for start in range(0, len(own), self._batch_size)]

    @torch.no_grad()
    def changes_to_gradients(self, weight: float) -> None:
        """Write what this worker changed into the gradients; the weights of all workers sum to 1."""
        for parameter, common in zip(self._parameters, self._common, strict=True):
            parameter.grad = weight * (common - parameter)

    @torch.no_grad()
    def outer_step(self) -> float:
        """Move the common weights by the summed changes and continue from them; returns the changes' norm."""
        squares = 0.0
        for parameter, common in zip(self._parameters, self._common, strict=True):
            change = parameter.grad
            assert change is not None
            squares += float(change.square().sum())
            momentum = self._state[parameter].setdefault(_MOMENTUM, torch.zeros_like(parameter))
            momentum.mul_(_OUTER_MOMENTUM).add_(change)
            common.sub_(_OUTER_RATE * (change + _OUTER_MOMENTUM * momentum))
            parameter.copy_(common)
            parameter.grad = None
        return squares**0.5

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the common weights: the step is repeated."""
        for parameter, common in zip(self._parameters, self._common, strict=True):
            parameter.copy_(common)
            parameter.grad = None
