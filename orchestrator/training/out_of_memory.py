"""What a worker does when memory runs out after all: it recognises it, and does the same with less at a time."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

import torch
from safetensors import SafetensorError

from strategies.contract import Techniques
from strategies.step import host_memory

T = TypeVar("T")

# Allocators of CUDA, HIP, XPU and MPS, Triton and NCCL say "out of memory"; CUDA's and AMD's libraries name a status of
# their own (cuBLAS, cuSOLVER, cuDNN 8 and 9, hipBLAS, rocBLAS, MIOpen), and cuBLAS and cuDNN, for whose workspace there
# was no room, that they are not initialized; the rest are NCCL's buffers and allocators of the host.
_TEXTS = (
    "out of memory",
    "error_out_of_memory",
    "hiperroroutofmemory",
    "miopenstatusallocfailed",
    "cublas_status_not_initialized",
    "cudnn_status_not_initialized",
    "failed to cuda calloc",
    "failed to cuda host alloc",
    "_status_alloc_failed",
    "_allocation_failed",
    "rocblas_status_memory_error",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, says that memory of the device or the host is used up."""
    if error is None:
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, RuntimeError | SafetensorError) and any(text in str(error).lower() for text in _TEXTS):
        return True
    return is_out_of_memory(error.__cause__ or (None if error.__suppress_context__ else error.__context__))


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def release_cache() -> None:
    """Give what nobody refers to any more back to the device and the host: another size of block may be needed next."""
    gc.collect()
    host_memory.trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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


def in_halves(batches: Iterable[list[T]], run: Callable[[list[T]], None]) -> tuple[list[T], str | None]:
    """Call `run` with every batch; one that runs out of memory is halved, and so are all that follow it.

    Returns the items that do not fit even alone and the first reason.  Only for passes without communication.
    """
    waiting, unfit, reason = list(batches)[::-1], list[T](), None
    most = max(map(len, waiting), default=0)
    while waiting:
        batch = waiting.pop()
        if len(batch) > most:
            waiting += [batch[most:], batch[:most]]
            continue
        lacking = None
        try:
            run(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            lacking = first_line(error)
        if lacking is None:
            continue
        release_cache()  # here, where no traceback holds the tensors of the failed pass
        reason = reason or lacking
        if len(batch) == 1:
            unfit += batch
        else:
            most = max(1, len(batch) // 2)
            waiting.append(batch)
    return unfit, reason
