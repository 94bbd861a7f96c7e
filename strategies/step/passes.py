"""How a worker that has the whole model computes its micro-batches: one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from strategies.step.out_of_memory import run_in_halves
from strategies.step.step import forward_backward, norm_of
from strategies.step.supervised_logits import Batch, loss_sum
from strategies.techniques.precision import autocast
from strategies.train_setup import Passes, StepPasses, TrainSetup
from strategies.workload import Techniques

T = TypeVar("T")


@dataclass
class SequentialPasses:
    """The default `Passes`: a micro-batch's forward and backward pass, then the next one's."""

    setup: TrainSetup

    @property
    def sends_back(self) -> bool:
        return False

    def run(self, micro_batches: Sequence[list[int]], step: StepPasses) -> torch.Tensor:
        loss = torch.zeros((), device=self.setup.device)
        if not micro_batches:
            step.scaler.scale(loss)  # it makes its tensors with the first loss, and the update asks for them
        for number, sample_ids in enumerate(micro_batches, start=1):
            batch = step.take(sample_ids)
            step.begin(batch)
            if number == len(micro_batches):
                step.before_last()
            loss += forward_backward(self.setup, batch, step.num_supervised, step.techniques, step.scaler)
        return loss

    def each(self, batches: Sequence[list[T]], call: Callable[[list[T]], None]) -> tuple[list[T], str | None]:
        return run_in_halves(batches, call)

    def loss_sum(self, batch: Batch, techniques: Techniques) -> torch.Tensor:
        with autocast(batch.input_ids_BT.device.type, techniques.dtype):
            return loss_sum(self.setup.model, batch, techniques.loss_type)

    def logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return self.setup.model(input_ids=ids_BT, use_cache=False).logits

    def generate(self, **arguments: Any) -> torch.Tensor:
        return self.setup.model.generate(**arguments)  # type: ignore[operator]

    def gradient_norm(self) -> torch.Tensor:
        return norm_of(self.setup.parameters.values())

    def spread_overflow(self) -> None:
        """Nothing to do: sums over workers hold it already."""

    def times(self) -> None:
        """None: it waits for no other worker."""


def passes_of(setup: TrainSetup) -> Passes:
    """How a training's passes run: in its own way, or one after the other."""
    return setup.passes or SequentialPasses(setup)
