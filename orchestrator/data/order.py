"""Which samples each step sees: a function of (seed, epoch, global sample index) and nothing else.

Ranks, micro-batches and restarts do not appear here, so any number of workers sees the same global batches.
"""

from __future__ import annotations

import array
import math
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # counting steps is part of planning, which needs no numpy
    import numpy


@dataclass(frozen=True)
class Order:
    """The steps of a run; each epoch ends with a shorter step if the numbers do not divide."""

    num_samples: int
    global_batch_size: int
    seed: int
    num_train_epochs: float
    max_steps: int = -1

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_samples / self.global_batch_size)

    @property
    def num_steps(self) -> int:
        by_epochs = max(1, math.ceil(self.steps_per_epoch * self.num_train_epochs))
        return self.max_steps if self.max_steps > 0 else by_epochs

    def sample_ids(self, step: int) -> list[int]:
        """The samples of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.global_batch_size
        return _permutation(self.seed, epoch, self.num_samples)[start : start + self.global_batch_size].tolist()

    def epoch(self, step: int) -> float:
        """Passes over the data finished after `step` steps."""
        return step / self.steps_per_epoch


def hash_ids(sample_ids: list[int]) -> str:
    """A short fingerprint of a step's samples, in their order; equal runs show equal fingerprints."""
    return f"{zlib.crc32(array.array('q', sample_ids).tobytes()):08x}"


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_samples: int) -> numpy.ndarray:
    import numpy

    return numpy.random.Generator(numpy.random.Philox(key=[seed, epoch])).permutation(num_samples)
