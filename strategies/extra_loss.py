"""A loss beside that of the tokens: what a method adds to each micro-batch of its training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # torch is for workers; planning must not load it
    import torch


class ExtraLoss(Protocol):
    """A loss beside that of the tokens, which trains and is told apart from it: never a part of a reported loss.

    Called once after each batch's forward pass in training, it is a mean over what that batch's loss is a sum over
    (supervised tokens, an objective's samples), with gradients, and counts by their share of the step: so the division
    into micro-batches and workers changes nothing.
    """

    num_totals: int  # numbers that `take` returns

    def over(self, batch: Any) -> AbstractContextManager[None]:
        """Inside the block the model computes this batch."""
        ...

    def __call__(self) -> torch.Tensor:
        """Of the batch that has been computed."""
        ...

    def take(self) -> list[float]:
        """Totals since it was last asked, to be added up over workers."""
        ...

    def metrics_of(self, totals: Sequence[float]) -> dict[str, float]:
        """What is told of a step by the totals of all workers."""
        ...
