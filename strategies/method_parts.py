"""What some methods add to training beside model and optimizer: before some steps, or to each micro-batch."""

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

    @property
    def num_totals(self) -> int:
        """Numbers that `take` returns."""
        ...

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


class Learner(Protocol):
    """Something that has to see gradients before some steps: of the step's first samples, the same on every worker."""

    rows: int  # samples that it learns from
    num_looks: int  # 0 = at gradients of the step's first samples; else so often forward alone, of later steps' too

    def is_due(self, step: int) -> bool:
        """Whether it learns before this step: `begin_learning`, passes and `next_learning`s, `end_learning`."""
        ...

    def begin_learning(self, num_passes: int) -> None:
        """The next backward passes move nothing."""

    def watch(self, batch: Any) -> None:
        """The next pass is of this batch."""

    def next_learning(self) -> None: ...

    def end_learning(self) -> dict[str, Any]:
        """What was learnt, for the run's record, with a sentence `text`; no gradient is left behind."""
        ...


class Weighing(Protocol):
    """Weights of samples in the loss that trains, decided from the losses of all training rows before some steps.

    They lie in the setup's `buffers`, as a checkpoint must hold them; held-out losses are not weighed.
    """

    weights_N: torch.Tensor  # of each sample's tokens

    def is_due(self, step: int) -> bool:
        """Whether they are decided anew before this step."""
        ...

    def weigh(self, losses_N: torch.Tensor, num_supervised_N: torch.Tensor) -> dict[str, Any]:
        """Decide them from each sample's summed loss; what was decided, for the run's record, with a `text`."""
        ...


class HeldOutObserver(Protocol):
    """Something that looks at what held-out rows do in the model, before some steps and without gradients.

    What it keeps lies in the setup's `buffers`, as a checkpoint must hold it.
    """

    def is_due(self, step: int) -> bool:
        """Whether it looks before this step."""
        ...

    def over(self, batch: Any) -> AbstractContextManager[None]:
        """Inside the block the model computes this batch; one that fails leaves nothing behind."""
        ...

    def end(self) -> dict[str, Any]:
        """What was seen, for the run's record, with a sentence `text`."""
        ...
