"""Bytes that jobs take together over one base model.  Pure arithmetic on what each was planned to take alone.

The base counts once.  What trains, its gradients and its optimizer's state count for every job: a pass may find all of
them there.  A pass holds no more tokens than the largest micro-batch that one of the jobs may have, so activations and
logits are those of one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clusters.capability import DeviceCapability
from strategies.contract import MemoryEstimate
from strategies.cost.reserved import with_framework


@dataclass(frozen=True)
class JobMemory:
    """What one job was planned to take."""

    estimate: MemoryEstimate
    trained_bytes: float  # of its trained weights, which are part of the estimate's
    tokens: int  # of its heaviest micro-batch
    limit: int  # tokens that a micro-batch of it may have

    @property
    def own_bytes(self) -> float:
        """That come with it wherever the base is: weights, gradients, optimizer."""
        return 2 * self.trained_bytes + self.estimate.optimizer_bytes


def estimate_together(jobs: Sequence[JobMemory], device: DeviceCapability) -> MemoryEstimate:
    """Memory of a device on which these jobs train at once."""
    tokens = min(max(job.limit for job in jobs), sum(job.tokens for job in jobs))

    def of_row(part: str) -> float:
        """Of the fullest row: each token as the costliest of any job."""
        return tokens * max(getattr(job.estimate, part) / max(1, job.tokens) for job in jobs)

    tensors = MemoryEstimate(
        weights_bytes=max(job.estimate.weights_bytes - job.trained_bytes for job in jobs)
        + sum(job.trained_bytes for job in jobs),
        gradients_bytes=sum(job.trained_bytes for job in jobs),
        optimizer_bytes=sum(job.estimate.optimizer_bytes for job in jobs),
        activations_bytes=of_row("activations_bytes"),
        logits_bytes=of_row("logits_bytes"),
        buffers_bytes=max(job.estimate.buffers_bytes for job in jobs),
        host_bytes=max(job.estimate.host_bytes for job in jobs),
    )
    return with_framework(tensors, device)
