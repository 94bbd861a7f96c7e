"""What a worker does when a micro-batch does not fit after all: less at a time, the same result."""

from __future__ import annotations

from dataclasses import replace

import torch

from strategies.contract import Techniques

# What allocators of the host say; on a GPU there is an exception of its own.
_SAID = ("can't allocate memory", "not enough memory", "std::bad_alloc", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of a forward or backward pass says that memory is used up."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in _SAID)


def leaner(techniques: Techniques, longest: int) -> Techniques | None:
    """The next leaner way to run the same samples of at most `longest` tokens; None where there is none.

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
