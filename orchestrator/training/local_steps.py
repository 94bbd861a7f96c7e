"""Local steps: every worker trains alone for a while, then what they changed is averaged (DiLoCo, arXiv 2311.08105).

One sum for many steps, for networks on which a sum a step is too dear.  It is another computation than the synchronous
one, with its own convergence, so a job has to ask for it (strategy.local_steps).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from orchestrator.training.parallel import GradientSum, Group

_OUTER_RATE, _OUTER_MOMENTUM = 0.7, 0.9  # Nesterov's, as the paper found best


class LocalSteps:
    """The weights all workers had in common last, and the outer optimizer that moves them."""

    def __init__(self, group: Group, parameters: Iterable[torch.nn.Parameter], batch_size: int) -> None:
        self.batch_size = batch_size  # samples of a local step
        self._parameters = list(parameters)
        self._common = [parameter.detach().clone() for parameter in self._parameters]
        self._momentum = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._sum = GradientSum(group, self._parameters)

    def steps(self, mine: Sequence[int], step: Callable[[Sequence[int]], None]) -> int:
        """Call `step` with the samples of each local step in turn; how many there were.

        Who has a larger share makes more steps of the same size.
        """
        parts = [mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)]
        for part in parts:
            step(part)
        return len(parts)

    def meet(self, weight: float) -> None:
        """Average what the workers changed, weighted (weights of all sum to 1), and go on from the common weights."""
        with torch.no_grad():
            for parameter, common in zip(self._parameters, self._common, strict=True):
                parameter.grad = weight * (common - parameter)
            self._sum.finish()
            for parameter, common, momentum in zip(self._parameters, self._common, self._momentum, strict=True):
                change = parameter.grad
                assert change is not None
                momentum.mul_(_OUTER_MOMENTUM).add_(change)
                common.sub_(_OUTER_RATE * (change + _OUTER_MOMENTUM * momentum))
                parameter.copy_(common)
                parameter.grad = None

    @property
    def bytes_sent(self) -> int:
        return self._sum.bytes_sent

    def close(self) -> None:
        self._sum.close()
