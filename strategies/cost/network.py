"""Seconds that workers wait for each other's gradients, by way.  Pure arithmetic over a measured link.

Legend: N workers, b bytes of gradients, w bytes a second of the slowest link, r its round trip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_LEAST_BUCKET_BYTES = 64 * 2**10
_LARGEST_BUCKET_BYTES = 25 * 2**20
_BUCKETS = 6  # so that most have left when the backward pass ends
_GROUP_S = 0.02  # of a step, whatever the link: hooks, copies, everybody's numbers (tests/benchmarks/uneven.py, 1 Gbit)
_LAYERS = 30  # of a model, as far as the first one's wait is concerned
_AVERAGED_PER_S = 1.5e9  # of a core: (inputs + outputs) (N r)^2 of products averaged and cut (LOG.md, "Rare sums")
_BACKWARD = 0.6  # of a micro-batch's time: gradients leave while it runs


@dataclass(frozen=True)
class Network:
    """The slowest link among a group of workers."""

    num_workers: int
    bytes_per_s: float
    round_trip_s: float

    def all_reduce_s(self, num_bytes: float) -> float:
        """A ring: 2 (N - 1) / N b / w, in 2 (N - 1) messages (Thakur et al., 2005)."""
        if self.num_workers < 2 or not num_bytes:
            return 0.0
        ring = (self.num_workers - 1) / self.num_workers
        return 2 * num_bytes * ring / self.bytes_per_s + self.latency_s

    @property
    def step_s(self) -> float:
        """Of a step of a group beside its gradients: everybody's numbers, hooks, copies."""
        return self.latency_s + _GROUP_S

    @property
    def latency_s(self) -> float:
        """Of one sum, however small."""
        return (self.num_workers - 1) * self.round_trip_s

    def gather_s(self, num_bytes: float) -> float:
        """Parts of all workers brought to each of them, or summed into parts: half of an all-reduce."""
        return self.all_reduce_s(num_bytes) / 2

    def gather_wait_s(self, num_bytes: float, compute_s: float) -> float:
        """What a micro-batch waits for sharded weights, gathered layer by layer while the layer before computes.

        The longer of the two counts, and the first of some thirty layers has nothing to hide behind (FSDP's
        prefetching, arXiv 2304.11277; DeepSpeed's overlap_comm and prefetch buckets).
        """
        all_s = self.gather_s(num_bytes)
        return max(all_s / _LAYERS, all_s - compute_s)

    def averaged_products_s(self, num_bytes: float, rank: int) -> float:
        """Workers that train apart send their adapters to all others, and each averages the products of all.

        Received are (N - 1) b; the averaging is N^2 r^2 (inputs + outputs) of each map, and b = 4 r (inputs + outputs).
        """
        averaging_s = self.num_workers**2 * rank * num_bytes / 4 / _AVERAGED_PER_S
        return self.step_s + self.gather_s(self.num_workers * num_bytes) + averaging_s

    def bucket_bytes(self, num_bytes: float) -> int:
        """Of gradients that leave together: a few buckets, none so small that its round trips cost more than itself."""
        least = max(_LEAST_BUCKET_BYTES, self.bytes_per_s * self.latency_s)
        return int(min(_LARGEST_BUCKET_BYTES, max(least, num_bytes / _BUCKETS)))

    def exposed_s(self, num_bytes: float, micro_batch_s: float, bucket_bytes: float) -> float:
        """What a step waits beyond the backward pass of its last micro-batch: for gradients, and then for the step's
        numbers (loss, wishes, paces), which leave after them.
        """
        return self.unhidden_s(num_bytes, micro_batch_s, bucket_bytes) + self.step_s

    def unhidden_s(self, num_bytes: float, micro_batch_s: float, bucket_bytes: float) -> float:
        """Of the sum of gradients what that backward pass does not hide, the last bucket at least."""
        buckets = max(1, math.ceil(num_bytes / bucket_bytes))
        all_s = self.all_reduce_s(num_bytes) + (buckets - 1) * self.latency_s
        last_s = self.all_reduce_s(min(num_bytes, bucket_bytes))
        return max(last_s, all_s - _BACKWARD * micro_batch_s)
