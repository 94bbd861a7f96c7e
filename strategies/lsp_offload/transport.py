"""What carries tensors between the device that computes and the host that updates, and counts the bytes.

On a machine without a GPU the "device" is the same memory, and the bus may be emulated: a copy takes bytes / bandwidth,
as long as the real one would.  Each direction is used by one thread, its lane.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class HostBuffers:
    """Host memory that is used again: new pages cost more than the update of what lies in them.

    A buffer has room for up to an eighth more rows than were asked for, so that a few serve any number of rows.
    """

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._free: dict[tuple[torch.dtype, tuple[int, ...]], list[torch.Tensor]] = {}
        self._lent: dict[int, torch.Tensor] = {}  # whole buffers by their memory

    def take(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor with any content."""
        rows, held = shape[0] if shape else 0, tuple(shape)
        if len(held) > 0:
            held = (_round_up(rows), *held[1:])
        try:
            whole = self._free.setdefault((dtype, held), []).pop()
        except IndexError:
            whole = torch.empty(*held, dtype=dtype, pin_memory=self._pinned)
        self._lent[_place_of(whole)] = whole
        return whole[:rows] if held != tuple(shape) else whole

    def give(self, tensor: torch.Tensor) -> None:
        """Take a buffer back; what was never taken from here (on a bus that is emulated) is left to its owner."""
        whole = self._lent.pop(_place_of(tensor), None)
        if whole is not None:
            self._free.setdefault((whole.dtype, tuple(whole.shape)), []).append(whole)


def _place_of(tensor: torch.Tensor) -> int:
    """Which memory a tensor lies in: that of a buffer and of its first rows is one."""
    return tensor.untyped_storage()._cdata


def _round_up(rows: int) -> int:
    """To an eighth of the power of two below: eight sizes of buffers for each doubling."""
    step = max(1, (1 << max(0, rows.bit_length() - 1)) // 8)
    return -(-rows // step) * step


class Transport(Protocol):
    """The bus.  Calls block until the bytes are there; lanes of their own make them overlap with compute."""

    down_bytes: int
    up_bytes: int
    buffers: HostBuffers  # who is done with a host tensor gives it back here

    def mark(self) -> Any:
        """A mark of the work queued on the device so far: `down` waits until it is done."""
        ...

    def down(self, tensor: torch.Tensor, mark: Any) -> torch.Tensor:
        """A device tensor in one of the host's buffers."""
        ...

    def up(self, tensor: torch.Tensor, device: torch.device, use: Callable[[torch.Tensor], None]) -> None:
        """Bring a host buffer to the device and let `use` have it there; takes the buffer back when that is done."""
        ...


@dataclass
class EmulatedBus:
    """A bus of a given bandwidth on a machine that has none; None = memory itself."""

    bytes_per_s: float | None = None
    down_bytes: int = 0
    up_bytes: int = 0
    buffers: HostBuffers = field(default_factory=HostBuffers)

    def mark(self) -> None:
        return None

    def down(self, tensor: torch.Tensor, mark: Any) -> torch.Tensor:
        self.down_bytes += size_of(tensor)
        return self._carried(tensor)

    def up(self, tensor: torch.Tensor, device: torch.device, use: Callable[[torch.Tensor], None]) -> None:
        self.up_bytes += size_of(tensor)
        use(self._carried(tensor))
        self.buffers.give(tensor)

    def _carried(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same memory, later: a bus has an engine of its own, and a copy would take a core from the update."""
        if self.bytes_per_s:
            time.sleep(size_of(tensor) / self.bytes_per_s)
        return tensor


class CudaBus:
    """A GPU's bus: a stream for each direction and pinned buffers, so that copies run beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self.down_bytes = self.up_bytes = 0
        self.buffers = HostBuffers(pinned=True)
        self._device = device
        self._down, self._up = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def down(self, tensor: torch.Tensor, mark: torch.cuda.Event) -> torch.Tensor:
        self.down_bytes += size_of(tensor)
        host = self.buffers.take(tensor.shape, tensor.dtype)
        with torch.cuda.stream(self._down):
            self._down.wait_event(mark)
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._down)  # the allocator must not hand it out before it is read
        self._down.synchronize()
        return host

    def up(self, tensor: torch.Tensor, device: torch.device, use: Callable[[torch.Tensor], None]) -> None:
        self.up_bytes += size_of(tensor)
        with torch.cuda.stream(self._up):
            use(tensor.to(device, non_blocking=True))
        self._up.synchronize()
        self.buffers.give(tensor)


def bus_of(device: torch.device) -> Transport:
    """The transport between a device and its host."""
    return CudaBus(device) if device.type == "cuda" else EmulatedBus()


def size_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
