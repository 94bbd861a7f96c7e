"""The order of a stage's forward and backward passes: one forward, one backward (1F1B).

Narayanan et al., arXiv 2104.04473 (section 2.2).  `ahead` keeps more micro-batches in flight than that schedule's
least, so that a slow link works while the stages compute: activations of each take memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Operation:
    """A forward or backward pass of one micro-batch."""

    is_forward: bool
    micro_batch: int


def num_in_flight(index: int, count: int, num_micro_batches: int, ahead: int = 0) -> int:
    """The most micro-batches whose activations stage `index` of `count` keeps at once."""
    return min(num_micro_batches, (count - index - 1) * (1 + ahead) + 1)


def operations(index: int, count: int, num_micro_batches: int, ahead: int = 0) -> list[Operation]:
    """What stage `index` of `count` does in one step, in order."""
    first = num_in_flight(index, count, num_micro_batches, ahead)
    order = [Operation(True, number) for number in range(first)]
    for number in range(num_micro_batches):
        order.append(Operation(False, number))
        if first + number < num_micro_batches:
            order.append(Operation(True, first + number))
    return order
