"""Keep freed memory in the process instead of giving it back to the kernel after every operation.

glibc maps each large tensor anew and unmaps it when it is freed, so a training step on a CPU spends a tenth of its time
on page faults.  Told to keep what it has, malloc finds the block of the step before.  Measured on SmolLM2-135M, bf16,
two cores: 415 -> 459 tokens/s (median of 16 steps each, alternating), at 0.3 GiB more resident memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator

from strategies.step import thread_waits

# Read when a process starts.  glibc: one arena for all threads, since only that one can grow beyond 64 MiB.  oneDNN and
# torch's layer above it each keep the last 1024 products, about a MiB for every size in bf16, and batches have ever new
# numbers of tokens: over a GiB after some fifty steps.  A micro-batch needs some twenty, which oneDNN keeps for all
# threads; torch's layer keeps its own for each thread, of which runs over one base have one each.
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "4"}

# malloc.h of glibc: name -> (while kept, its default)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_SETTINGS = {
    _M_MMAP_MAX: (0, 65536),
    _M_TRIM_THRESHOLD: (2**31 - 1, 128 * 2**10),
    _M_TOP_PAD: (256 * 2**20, 128 * 2**10),
}


def process_environment() -> dict[str, str]:
    """What a process that computes on a CPU starts with; what the user has set stays."""
    return {name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()} | thread_waits.environment()


@functools.cache
def freeze_imports() -> None:
    """Leave what this process has imported so far out of every later search for garbage, half a second each."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def kept() -> Iterator[bool]:
    """Hold on to freed memory inside the block; yields whether the C library understood.

    Not for code that grows tensors step by step, such as generation with a cache: the freed blocks never fit again.
    """
    understood = keep()
    try:
        yield understood
    finally:
        let_go()


def keep() -> bool:
    """Hold on to freed memory until `let_go`; whether the C library understood."""
    mallopt = _mallopt()
    return mallopt is not None and _set(mallopt, 0)


def let_go() -> None:
    """Give freed memory back to the kernel, what is free now included."""
    mallopt = _mallopt()
    if mallopt is not None:
        _set(mallopt, 1)
        trim()


def trim() -> None:
    """Give free pages back now; between steps of changing sizes it keeps the heap from growing by its gaps."""
    if _mallopt() is not None:
        ctypes.CDLL(None).malloc_trim(0)


def _set(mallopt: Callable[[int, int], int], column: int) -> bool:
    """Apply one column of the settings, all of them whatever the first says."""
    return 0 not in [mallopt(name, values[column]) for name, values in _SETTINGS.items()]


def _mallopt() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return None
