"""Wait for GPUs that others use."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_RETRY_S = 2.0
_REPORT_EVERY_S = 60.0


def wait_for_gpus(
    take: Callable[[], T | None], blocked_by: Callable[[], str], say: Callable[[str], None], is_over: Callable[[], bool]
) -> T | None:
    """What `take` gives once it gives something; None when `is_over` becomes true first.

    Says what is waited for, at once and then every minute.
    """
    reported_s = -_REPORT_EVERY_S
    while (found := take()) is None:
        if time.monotonic() - reported_s >= _REPORT_EVERY_S:
            reported_s = time.monotonic()
            say(f"waiting for {blocked_by()}")
        if is_over():
            break
        time.sleep(_RETRY_S * (0.5 + random.random()))  # two that wait for each other must not go in step
    return found
