"""Passes under DeepSpeed: its workers gather and reduce in every one, so all run as many as the one with the most."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from strategies.step.passes import SequentialPasses
from strategies.step.step import forward_backward
from strategies.step.supervised_logits import Batch, loss_sum
from strategies.train_setup import StepPasses
from strategies.workload import Techniques

T = TypeVar("T")


@dataclass
class EvenPasses(SequentialPasses):
    """`Passes` of workers that divide the weights; every call is made by all of them together.

    What runs out of memory is not repeated: the others wait inside that very pass.  Gradients and their norm are
    DeepSpeed's own, in its update.
    """

    wire: torch.device  # where tensors must lie to be sent

    def run(self, micro_batches: Sequence[list[int]], step: StepPasses) -> torch.Tensor:
        loss = torch.zeros((), device=self.setup.device)
        for sample_ids in self._even(micro_batches):
            batch = step.take(sample_ids or step.filler)
            step.begin(batch)
            counted = step.num_counted if sample_ids else math.inf
            loss += forward_backward(self.setup, batch, counted, step.techniques, step.scaler)
        return loss

    def each(self, batches: Sequence[list[T]], call: Callable[[list[T]], None]) -> tuple[list[T], str | None]:
        for batch in self._even(batches):
            call(batch)
        return [], None

    def loss_sum(self, batch: Batch, techniques: Techniques) -> torch.Tensor:
        own = batch.to(self.setup.device)
        return loss_sum(self.setup.model, own, techniques.loss_type)  # the weights are in that precision already

    def generate(self, **arguments: Any) -> torch.Tensor:
        return super().generate(**arguments, synced_gpus=True)

    def _even(self, batches: Sequence[list[T]]) -> list[list[T]]:
        if dist.get_world_size() == 1:
            return list(batches)
        most = torch.tensor(len(batches), device=self.wire)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return spread(batches, int(most))


def spread(batches: Sequence[list[T]], count: int) -> list[list[T]]:
    """As many batches as `count`: the largest are halved, then empty ones are added."""
    evened = list(batches)
    while len(evened) < count:
        largest = max(range(len(evened)), key=lambda index: len(evened[index]), default=None)
        if largest is None or len(evened[largest]) < 2:
            evened.append([])
        else:
            whole = evened.pop(largest)
            evened += [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return evened
