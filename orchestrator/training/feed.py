"""Micro-batches on the device; the next step's first one is made while the GPU still computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orchestrator.data.batches import collate
from orchestrator.data.dataset import Dataset
from orchestrator.data.packing import micro_batches
from strategies.reuse.tree import group_alike
from strategies.step.supervised_logits import Batch
from strategies.train_setup import KnownLayers
from strategies.workload import Techniques


def micro_batches_of(data: Dataset, sample_ids: Sequence[int], techniques: Techniques) -> list[list[int]]:
    """Samples grouped as they go through the model together, in the layout of the techniques."""
    if techniques.share_prefixes:
        groups = group_alike([data.tokens(one)[0].tolist() for one in sample_ids], techniques.micro_batch_tokens)
    else:
        rows, max_length = techniques.per_device_train_batch_size, techniques.max_length
        lengths = data.lengths if techniques.packing else data.padded_lengths
        groups = micro_batches(lengths[list(sample_ids)].tolist(), rows, max_length, techniques.packing)
    return [[sample_ids[place] for place in group] for group in groups]


def mismatched_batches_of(data: Dataset, sample_ids: Sequence[int], techniques: Techniques) -> list[list[int]]:
    """The same of labelled rows' questions with other rows' answers."""
    rows, max_length = techniques.per_device_train_batch_size, techniques.max_length
    lengths = data.mismatched_lengths[list(sample_ids)].tolist()
    groups = micro_batches(lengths, rows, max_length, techniques.packing)
    return [[sample_ids[place] for place in group] for group in groups]


class Feed:
    """Makes batches of samples, at most one of them ahead of time; `lower` has what is known of them follow."""

    def __init__(
        self,
        data: Dataset,
        packing: bool,
        device: torch.device,
        share_prefixes: bool = False,
        lower: KnownLayers | None = None,
    ) -> None:
        self._data, self._layout, self._device, self._lower = data, (packing, share_prefixes), device, lower
        self._ahead: tuple[list[int], Batch] | None = None
        self._num_taken = 0  # tokens, padding included

    def count(self) -> int:
        """Tokens of the batches that were taken since this was last asked, padding included."""
        counted, self._num_taken = self._num_taken, 0
        return counted

    def take(self, sample_ids: Sequence[int]) -> Batch:
        """The batch of these samples: the one made ahead where that holds them, else a new one."""
        ahead, self._ahead = self._ahead, None
        batch = ahead[1] if ahead and ahead[0] == list(sample_ids) else self._batch(sample_ids)
        self._num_taken += batch.input_ids_BT.numel()
        return batch

    def prepare(self, sample_ids: Sequence[int]) -> None:
        """Make a batch and begin to send it; called before the host waits for the GPU, it costs no time."""
        self._ahead = list(sample_ids), self._batch(sample_ids)

    def _batch(self, sample_ids: Sequence[int]) -> Batch:
        batch = collate(self._data, list(sample_ids), *self._layout).to(self._device)
        if self._lower and (parts := batch.parts):
            self._lower.expect(batch.sample_ids, parts)
        return batch
