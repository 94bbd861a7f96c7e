"""How a step falls into micro-batches on one device.  Pure arithmetic."""

from __future__ import annotations

import math

from strategies.pipeline.schedule import num_in_flight
from strategies.workload import Techniques, Workload

SPREAD = 0.05  # of a micro-batch: so few tokens more are spread over the others


def num_micro_batches(workload: Workload, techniques: Techniques) -> int:
    """Micro-batches of one step on one device."""
    tokens = workload.share * workload.tokens_per_step * padding(workload, techniques)
    return max(1, math.ceil(tokens / tokens_per_micro_batch(workload, techniques) - SPREAD))


def tokens_per_micro_batch(workload: Workload, techniques: Techniques) -> float:
    """Tokens of a full micro-batch, padding included."""
    tokens = workload.share * workload.tokens_per_step * padding(workload, techniques)
    return min(tokens, _micro_tokens(workload, techniques))


def _micro_tokens(workload: Workload, techniques: Techniques) -> float:
    rows = techniques.per_device_train_batch_size
    if techniques.packing:
        return rows * techniques.max_length
    return rows * padded_length(workload, techniques)


def padding(workload: Workload, techniques: Techniques) -> float:
    """Processed over real tokens.  Rows of similar length share a micro-batch."""
    if techniques.packing:
        return 1.0
    known = workload.padded_ratio
    if not known:
        return 1.0
    rows = techniques.per_device_train_batch_size
    if rows in known:
        return known[rows]
    return known[min(known, key=lambda count: abs(math.log(count / rows)))]


def padded_length(workload: Workload, techniques: Techniques) -> float:
    return workload.mean_length * padding(workload, techniques)


def micro_batches_in_flight(workload: Workload, techniques: Techniques) -> int:
    """The most micro-batches whose activations a device keeps at once: one, but on a stage of a pipeline."""
    stage = techniques.stage
    if stage is None:
        return 1
    return num_in_flight(stage.index, stage.count, num_micro_batches(workload, techniques), stage.ahead)
