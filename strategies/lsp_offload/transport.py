"""What carries tensors between the device that computes and the host that updates, and counts the bytes.

On a machine without a GPU the "device" is the same memory, and the bus is emulated: a copy takes bytes / bandwidth, as
long as the real one would.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch


class Transport(Protocol):
    """The bus.  Calls block until the bytes are there; lanes of their own make them overlap with compute."""

    down_bytes: int
    up_bytes: int

    def down(self, tensor: torch.Tensor) -> torch.Tensor:
        """A device tensor on the host."""
        ...

    def up(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A host tensor on the device."""
        ...


@dataclass
class EmulatedBus:
    """A bus of a given bandwidth on a machine that has none; None = memory itself."""

    bytes_per_s: float | None = None
    down_bytes: int = 0
    up_bytes: int = 0

    def down(self, tensor: torch.Tensor) -> torch.Tensor:
        self.down_bytes += size_of(tensor)
        return self._carried(tensor)

    def up(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        self.up_bytes += size_of(tensor)
        return self._carried(tensor).to(device)

    def _carried(self, tensor: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        copy = tensor.detach().clone()
        if self.bytes_per_s:
            rest_s = size_of(tensor) / self.bytes_per_s - (time.perf_counter() - start)
            if rest_s > 0:
                time.sleep(rest_s)
        return copy


def size_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
