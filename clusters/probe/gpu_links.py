"""Measure what the GPUs of one machine exchange, every pair once, with PyTorch.

Importing this loads torch.  Two copies cross at once, one each way, as in a ring; a small one tells the round trip.
A pair is measured while the others are idle: where several share a port, together they get less.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

import torch

from clusters.capability import DeviceCapability, Link
from clusters.probe.measure_device import seconds_each

_COPY_BYTES, _SMALL_BYTES = 64 * 2**20, 1024
_log = logging.getLogger(__name__)


def measure_gpu_links(gpus: Sequence[tuple[DeviceCapability, int]], budget_s: float) -> tuple[Link, ...]:
    """The way between every two GPUs, each with PyTorch's number of it; `budget_s` is the time of one pair."""
    links = []
    for (first, one), (second, other) in itertools.combinations(gpus, 2):
        if not (first.pci_bus_id and second.pci_bus_id):
            continue  # nothing by which the pair would be known later
        ends = torch.device("cuda", one), torch.device("cuda", other)
        reaches = torch.cuda.can_device_access_peer(one, other) and torch.cuda.can_device_access_peer(other, one)
        try:
            rate, trip = measure_pair(*ends, budget_s)
        except Exception as error:  # whatever a driver makes of it: this pair is unknown, the others are not
            _log.info("%s - %s: not measured: %s: %s", *ends, type(error).__name__, error)
            continue
        links.append(Link((first.pci_bus_id, second.pci_bus_id), rate, trip, "measured", reaches))
    return tuple(links)


def measure_pair(first: torch.device, second: torch.device, budget_s: float) -> tuple[float, float]:
    """Bytes a second in each direction while both are busy, and the seconds of a small copy there and back."""

    def wait() -> None:
        for place in (first, second):
            if place.type == "cuda":
                torch.cuda.synchronize(place)

    def exchange_s(num_bytes: int, share: float) -> float:
        here, there, from_here, from_there = (
            torch.zeros(num_bytes, dtype=torch.uint8, device=place) for place in (first, second, first, second)
        )

        def exchange() -> None:
            there.copy_(from_here, non_blocking=True)
            here.copy_(from_there, non_blocking=True)

        return seconds_each(exchange, share * budget_s, wait)

    return _COPY_BYTES / exchange_s(_COPY_BYTES, 0.8), exchange_s(_SMALL_BYTES, 0.2)
