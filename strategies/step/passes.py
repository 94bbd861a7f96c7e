"""How a worker that has the whole model computes its micro-batches: one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from strategies.step.out_of_memory import run_in_halves
from strategies.step.step import forward_backward, norm_of, summed_loss
from strategies.step.supervised_logits import Batch
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
            loss += forward_backward(self.setup, batch, step.num_counted, step.techniques, step.scaler)
        return loss

    def tell_order(self, follow: Callable[[bool, bool], None]) -> None:
        """One backward pass follows each forward pass."""

    def each(self, batches: Sequence[list[T]], call: Callable[[list[T]], None]) -> tuple[list[T], str | None]:
        return run_in_halves(batches, call)

    def loss_sum(self, batch: Batch, techniques: Techniques) -> torch.Tensor:
        device = self.setup.device
        with autocast(device.type, techniques.dtype):
            return summed_loss(self.setup, batch.to(device), techniques)

    def logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return self.setup.model(input_ids=ids_BT, use_cache=False).logits

    def generate(self, **arguments: Any) -> torch.Tensor:
        return generate(self.setup.model, **arguments)

    def gradient_norm(self) -> torch.Tensor:
        return norm_of(self.setup.parameters.values())

    def end_together(self, reason: str | None) -> None:
        if reason is not None:
            raise MemoryError(reason)

    def leave_update(self) -> None:
        """Nobody waits for it."""

    def spread_overflow(self) -> None:
        """Nothing to do: sums over workers hold it already."""

    def times(self) -> None:
        """None: it waits for no other worker."""


def generate(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **others: Any) -> torch.Tensor:
    """The model's own `generate`, of prompts that lie anywhere."""
    device = model.device
    return model.generate(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), **others)


def passes_of(setup: TrainSetup) -> Passes:
    """How a training's passes run: in its own way, or one after the other."""
    return setup.passes or SequentialPasses(setup)
