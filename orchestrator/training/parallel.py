"""Sums over workers.  One worker is a group of one: the same code path, no communication."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_BUCKET_ELEMENTS = 8 * 2**20  # 32 MiB of fp32: few calls, little extra memory


@dataclass(frozen=True)
class Group:
    """The workers of a run and this one's place among them."""

    rank: int = 0
    size: int = 1

    def sum(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Each number summed over the workers, in fp64."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over the workers.

        Parameters without a gradient here count as zero, so that workers with fewer micro-batches take part in the same
        calls: the number of collectives a step is equal everywhere.
        """
        if self.size == 1:
            return
        for bucket in _buckets(parameters):
            flat = torch.cat(
                [p.grad.reshape(-1) if p.grad is not None else torch.zeros_like(p).reshape(-1) for p in bucket]
            )
            dist.all_reduce(flat)
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = part.view_as(parameter)

    def gather(self, value: Any) -> list[Any]:
        """The value of every worker, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def _buckets(parameters: Iterable[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    buckets: list[list[torch.nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if not buckets or room < parameter.numel():
            buckets.append([])
            room = _BUCKET_ELEMENTS
        buckets[-1].append(parameter)
        room -= parameter.numel()
    return buckets
