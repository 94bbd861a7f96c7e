"""How much memory a worker holds, and the ways to run the same samples in less."""

from __future__ import annotations

import resource
import sys
from dataclasses import replace
from pathlib import Path

import torch

from strategies.workload import Techniques


def peak_bytes(device: torch.device) -> int:
    """Most memory this process has held: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes(device: torch.device) -> int:
    """Memory held now: on a CPU the whole process, libraries included."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: the peak so far is the nearest known figure
        return peak_bytes(device)
    return pages * resource.getpagesize()


def fallback(techniques: Techniques, longest: int) -> Techniques | None:
    """The next way to run the same samples of at most `longest` tokens in less memory; None where there is none.

    Micro-batches are halved, a packed row down to the longest sample; then activations are computed again.
    """
    rows, length = techniques.per_device_train_batch_size, techniques.max_length
    if rows > 1:
        return replace(techniques, per_device_train_batch_size=rows // 2)
    if techniques.packing and length > longest:
        return replace(techniques, max_length=max(longest, length // 2))
    if not techniques.gradient_checkpointing and not techniques.torch_compile:
        return replace(techniques, gradient_checkpointing=True)
    return None
