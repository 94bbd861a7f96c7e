"""What GPUs of one machine exchange a second: measured, declared, by the board's own links, or a guess over PCIe.

Figures are of one direction while the other is as busy: what a ring of GPUs gets.  NCCL's protocol leaves about 370 of
the 450 GB/s of an H100's NVLink (its maintainer in https://github.com/NVIDIA/nccl-tests/issues/212).  Over PCIe without
peer access each byte crosses the host's memory, once down and once up, and boards share its ports.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from clusters.capability import DeviceCapability, NodeCapability
from clusters.hardware import datasheet

NVLINK_REACHED = 370 / 450  # of the published rate
PEER_REACHED = 0.65  # of a PCIe slot's, where GPUs write into each other's memory
HOST_REACHED = 0.25  # of a PCIe slot's, by way of the host
_ROUND_TRIP_S = 20e-6  # to launch a collective and to hear of it
_TYPICAL_BYTES_PER_S = 8e9  # over PCIe 4.0 x16 by way of the host, where not even the slot is known


@dataclass(frozen=True)
class GpuLink:
    """The slowest link among some GPUs of one machine."""

    bytes_per_s: float
    round_trip_s: float
    is_assumed: bool  # neither measured nor declared nor the board's own


def slowest_inside(node: NodeCapability, devices: Sequence[DeviceCapability]) -> GpuLink:
    """What a ring of some of a machine's devices gets, which its slowest pair decides."""
    by_pair = {frozenset(link.between): link for link in node.gpu_links}
    pairs = [frozenset((a.pci_bus_id or "", b.pci_bus_id or "")) for a, b in itertools.combinations(devices, 2)]
    measured = [by_pair[pair] for pair in pairs if pair in by_pair]
    if measured and len(measured) == len(pairs):
        rate = min(link.bytes_per_s or _TYPICAL_BYTES_PER_S for link in measured)
        trip = max(link.round_trip_s or _ROUND_TRIP_S for link in measured)
        return GpuLink(rate, trip, any(link.bytes_per_s is None for link in measured))
    if node.gpu_link_bytes_per_s is not None:
        return GpuLink(node.gpu_link_bytes_per_s, _ROUND_TRIP_S, False)
    cards = [datasheet.find(device.name, device.memory_total_bytes) for device in devices if device.kind != "cpu"]
    own = [card.nvlink_bytes_per_s for card in cards if card and card.has_switched_nvlink and card.nvlink_bytes_per_s]
    if len(own) == len(devices) and len({card.name for card in cards if card}) == 1:
        return GpuLink(NVLINK_REACHED * min(own), _ROUND_TRIP_S, False)
    slots = [device.host_to_device_bytes_per_s for device in devices if device.host_to_device_bytes_per_s]
    rate = HOST_REACHED * min(slots) if len(slots) == len(devices) else _TYPICAL_BYTES_PER_S
    return GpuLink(rate, _ROUND_TRIP_S, True)
