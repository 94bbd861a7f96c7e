"""What carries tensors between the device that computes and the host that updates, and counts the bytes.

On a machine without a GPU the "device" is the same memory, and the bus may be emulated: a copy takes bytes / bandwidth,
as long as the real one would.  Each direction is used by one thread, its lane.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Transport(Protocol):
    """The bus.  Calls block until the bytes are there; lanes of their own make them overlap with compute."""

    down_bytes: int
    up_bytes: int

    def mark(self) -> Any:
        """What the device has been told so far: `down` waits until it has done that."""
        ...

    def down(self, tensor: torch.Tensor, mark: Any) -> torch.Tensor:
        """A device tensor on the host."""
        ...

    def up(self, tensor: torch.Tensor, device: torch.device, use: Callable[[torch.Tensor], None]) -> None:
        """Bring a host tensor to the device and let `use` have it there; returns when that is done."""
        ...


@dataclass
class EmulatedBus:
    """A bus of a given bandwidth on a machine that has none; None = memory itself."""

    bytes_per_s: float | None = None
    down_bytes: int = 0
    up_bytes: int = 0

    def mark(self) -> None:
        return None

    def down(self, tensor: torch.Tensor, mark: Any) -> torch.Tensor:
        self.down_bytes += size_of(tensor)
        return self._carried(tensor)

    def up(self, tensor: torch.Tensor, device: torch.device, use: Callable[[torch.Tensor], None]) -> None:
        self.up_bytes += size_of(tensor)
        use(self._carried(tensor))

    def _carried(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.bytes_per_s:
            return tensor
        start = time.perf_counter()
        copy = tensor.detach().clone()
        rest_s = size_of(tensor) / self.bytes_per_s - (time.perf_counter() - start)
        if rest_s > 0:
            time.sleep(rest_s)
        return copy


class CudaBus:
    """A GPU's bus: a stream and a pinned buffer for each direction, so that copies run beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self.down_bytes = self.up_bytes = 0
        self._device = device
        self._down, self._up = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._pinned: dict[str, torch.Tensor] = {}

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def down(self, tensor: torch.Tensor, mark: torch.cuda.Event) -> torch.Tensor:
        self.down_bytes += size_of(tensor)
        pinned = self._buffer("down", tensor)
        with torch.cuda.stream(self._down):
            self._down.wait_event(mark)
            pinned.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._down)  # the allocator must not hand it out before it is read
        self._down.synchronize()
        return pinned.clone()

    def up(self, tensor: torch.Tensor, device: torch.device, use: Callable[[torch.Tensor], None]) -> None:
        self.up_bytes += size_of(tensor)
        pinned = self._buffer("up", tensor)
        pinned.copy_(tensor)
        with torch.cuda.stream(self._up):
            use(pinned.to(device, non_blocking=True))
        self._up.synchronize()

    def _buffer(self, lane: str, like: torch.Tensor) -> torch.Tensor:
        held = self._pinned.get(lane)
        if held is None or held.numel() < like.numel():
            held = self._pinned[lane] = torch.empty(like.numel(), pin_memory=True)
        return held[: like.numel()].view(like.shape)


def bus_of(device: torch.device) -> Transport:
    """The transport between a device and its host."""
    return CudaBus(device) if device.type == "cuda" else EmulatedBus()


def size_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
