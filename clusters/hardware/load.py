"""What other programs leave of this machine's cores, found by computing: it holds in containers and at any niceness."""

from __future__ import annotations

import hashlib
import threading
import time

_BLOCK = bytes(2**18)  # large enough that hashlib lets the other threads run, a fraction of a millisecond of work


def core_shares(num_threads: int, seconds: float = 0.2) -> list[float]:
    """CPU seconds a second that each of so many threads gets when all compute at once, the largest first.

    1.0 is a core of its own.  For `seconds` all of them are busy.
    """
    barrier, found = threading.Barrier(num_threads), [0.0] * num_threads

    def compute(index: int) -> None:
        barrier.wait()
        began, began_cpu = time.perf_counter(), time.thread_time()
        while (passed := time.perf_counter() - began) < seconds:
            hashlib.sha256(_BLOCK)
        found[index] = min(1.0, (time.thread_time() - began_cpu) / passed)

    threads = [threading.Thread(target=compute, args=(index,), daemon=True) for index in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(found, reverse=True)
