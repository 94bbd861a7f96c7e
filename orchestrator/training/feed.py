"""Micro-batches on the device; the next step's first one is made while the GPU still computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orchestrator.data.batches import collate
from orchestrator.data.dataset import Dataset
from orchestrator.data.packing import micro_batches
from strategies.step.supervised_logits import Batch
from strategies.workload import Techniques


def micro_batches_of(lengths: Sequence[int], techniques: Techniques) -> list[list[int]]:
    """Indices of `lengths` grouped as they go through the model together, in the layout of the techniques."""
    rows, max_length = techniques.per_device_train_batch_size, techniques.max_length
    return micro_batches(lengths, rows, max_length, techniques.packing)


class Feed:
    """Makes batches of samples, at most one of them ahead of time."""

    def __init__(self, data: Dataset, packing: bool, device: torch.device) -> None:
        self._data, self._packing, self._device = data, packing, device
        self._ahead: tuple[list[int], Batch] | None = None

    def take(self, sample_ids: Sequence[int]) -> Batch:
        """The batch of these samples: the one made ahead where that holds them, else a new one."""
        ahead, self._ahead = self._ahead, None
        if ahead and ahead[0] == list(sample_ids):
            return ahead[1]
        return self._batch(sample_ids)

    def prepare(self, sample_ids: Sequence[int]) -> None:
        """Make a batch and begin to send it; called before the host waits for the GPU, it costs no time."""
        self._ahead = list(sample_ids), self._batch(sample_ids)

    def _batch(self, sample_ids: Sequence[int]) -> Batch:
        return collate(self._data, list(sample_ids), self._packing).to(self._device)
