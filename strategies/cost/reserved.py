"""What a process holds on its device beside its tensors, and how wrong the whole may be.  Pure arithmetic.

A GPU's allocator cuts tensors out of segments.  Those that stay (weights, optimizer state) fill theirs nearly; those
that come and go with a batch leave gaps; and where batches differ in length, blocks of the last one lie unused beside
those of the next, so that what changes is there twice.  Ours grow in place (step/device_memory.py) and are spared that.

`Gaps` is fitted, least absolute error, on 142 published peaks of ../shared/tables (tests/benchmarks/memory_errors.py
fits it again, once without each table); the context is the median of what PyTorch's out-of-memory messages of
fine-tuning runs leave between the process's memory and the allocator's: 0.18 GiB (RTX 3070, codellama issue 82), 0.22
(T4, llama-cookbook 309), 0.51 (RTX 4090, lora-fast 1), 0.49 (A100, LlamaFactory 257), 1.35 (V100, an older driver,
ChatGLM-Finetuning 23); NCCL's 1 GiB is the rest where several GPUs train (1.95 in all, peft 1703).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from clusters.capability import CONTEXT_BYTES, DeviceCapability
from clusters.units import GIB
from strategies.contract import MemoryEstimate

NCCL_BYTES = 1.0 * GIB
LOW, HIGH = 0.80, 1.24  # of the expected bytes: 95 % of the published peaks lie between


@dataclass(frozen=True)
class Gaps:
    """Unused bytes of the allocator's segments, for each byte of a kind of tensor."""

    steady: float = 0.03  # rounding to 2 MiB, and segments of 20 MiB that are not full
    moving: float = 0.05  # activations and logits of batches of one length
    changing: float = 1.0  # more, of those whose length changes, and of layers that are gathered in turn

    def total(self, tensors: MemoryEstimate, changing_bytes: float = 0.0) -> float:
        """Unused bytes beside `tensors`, of which `changing_bytes` change in size from batch to batch."""
        moving = tensors.activations_bytes + tensors.logits_bytes
        return self.steady * (tensors.tensors_bytes - moving) + self.moving * moving + self.changing * changing_bytes


GAPS = Gaps()


def with_framework(tensors: MemoryEstimate, device: DeviceCapability, num_shards: int = 1) -> MemoryEstimate:
    """An estimate of tensors with what the process holds beside them, and its range.

    CPU: the libraries of a worker and the gaps that a heap of changing tensor sizes leaves, both measured in
    orchestrator/LOG.md.
    """
    if device.kind == "cpu":
        exact = tensors.tensors_bytes
        moving = tensors.activations_bytes + tensors.logits_bytes + tensors.buffers_bytes
        return replace(
            tensors,
            framework_bytes=0.7 * GIB + 0.5 * moving,
            low_bytes=exact + 0.4 * GIB,
            high_bytes=exact + 1.3 * moving + 1.6 * GIB,
        )
    nccl = NCCL_BYTES if num_shards > 1 else 0.0
    return with_range(replace(tensors, framework_bytes=CONTEXT_BYTES + nccl + GAPS.total(tensors)))


def with_range(estimate: MemoryEstimate, low: float = LOW, high: float = HIGH) -> MemoryEstimate:
    """The estimate with the range that its total has on a GPU."""
    return replace(estimate, low_bytes=low * estimate.total_bytes, high_bytes=high * estimate.total_bytes)
