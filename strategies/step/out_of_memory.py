"""Out-of-memory errors: recognise them, free what can be freed, and try again with less."""

from __future__ import annotations

import contextlib
import errno
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from safetensors import SafetensorError

from clusters.safe.reading import first_line
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
    """Whether an error, or what it was raised from, says that the device or the host is out of memory."""
    if error is None:
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, RuntimeError | SafetensorError) and any(text in str(error).lower() for text in _TEXTS):
        return True
    return is_out_of_memory(error.__cause__ or (None if error.__suppress_context__ else error.__context__))


@dataclass
class Shortage:
    """Why memory ran out; None where it did not."""

    reason: str | None = None


@contextlib.contextmanager
def catch_out_of_memory() -> Iterator[Shortage]:
    """Catch an out-of-memory error of the block; the tensors that it holds are free afterwards."""
    shortage = Shortage()
    try:
        yield shortage
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        shortage.reason = first_line(error)


def release_cache() -> None:
    """Return freed memory to the device and the host: the next blocks may have other sizes."""
    gc.collect()
    host_memory.trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_in_halves(batches: Iterable[list[T]], run: Callable[[list[T]], None]) -> tuple[list[T], str | None]:
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
        with catch_out_of_memory() as shortage:
            run(batch)
        if shortage.reason is None:
            continue
        release_cache()  # here, where no traceback holds the tensors of the failed pass
        reason = reason or shortage.reason
        if len(batch) == 1:
            unfit += batch
        else:
            most = max(1, len(batch) // 2)
            waiting.append(batch)
    return unfit, reason
