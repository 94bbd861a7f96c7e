"""A GPU's memory as one process may use it: segments that grow, and an end where the plan has one.

Batches of changing length cut torch's fixed segments into pieces that fit nothing; expandable ones grow in place.  The
end is needed where a driver pages GPU memory out instead of refusing it (WSL2, a card with a screen): a step would run
through the bus, many times slower, and nobody would learn that memory was short.
"""

from __future__ import annotations

import logging
import os

import torch

from clusters.capability import CONTEXT_BYTES

# A user's own, which stand: https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage
_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_GROWING = "expandable_segments:True"
_log = logging.getLogger(__name__)


def grow_segments() -> None:
    """Let the GPU allocator's segments grow; before the first tensor of this process on a GPU.

    The allocator reads its environment when it is first used; after that it is said that nothing was changed.
    """
    if any(name in os.environ for name in _SETTINGS):
        return
    if torch.cuda.is_initialized():
        _log.warning("CUDA is initialised already: its allocator keeps fixed segments, which may fragment")
        return
    os.environ[_SETTINGS[0]] = _GROWING


def limit(device: torch.device, usable_bytes: float | None) -> float | None:
    """Prepare the allocator of a GPU before its first tensor; the fraction of the card it may take, None = all.

    `usable_bytes` is what the plan was made for, None where nobody knew.
    """
    if device.type != "cuda":
        return None
    grow_segments()
    fraction = share_of(usable_bytes, torch.cuda.get_device_properties(device).total_memory)
    if fraction is not None:
        torch.cuda.set_per_process_memory_fraction(fraction, device)
    return fraction


def share_of(usable_bytes: float | None, total_bytes: float) -> float | None:
    """The part of a card that torch's allocator may take, so that with its context a process stays within `usable`."""
    if usable_bytes is None:
        return None
    return min(1.0, max(0.0, usable_bytes - CONTEXT_BYTES) / total_bytes)
