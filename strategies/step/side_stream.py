"""Copies between a GPU and pinned host memory beside the computation: on a stream of their own, and nobody waits."""

from __future__ import annotations

import torch


class SideStream:
    """One device's stream for copies; they run in the order in which they were asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.Stream(device)

    def down(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Event]:
        """A copy in pinned memory, and the event after which it can be read; work that was queued before counts."""
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            there = tensor if dtype is None else tensor.to(dtype)
            host = torch.empty_like(there, device="cpu", pin_memory=True)
            host.copy_(there, non_blocking=True)
        tensor.record_stream(self._stream)  # the allocator must not hand it out before it is read
        return host, self._stream.record_event()

    def up(self, host: torch.Tensor) -> tuple[torch.Tensor, torch.Event]:
        """A copy on the device, for `arrived`."""
        with self._stream:
            tensor = host.to(self._device, non_blocking=True)
        return tensor, self._stream.record_event()

    def copy(self, host: torch.Tensor, tensor: torch.Tensor) -> torch.Event:
        """Fill a tensor of the device from pinned memory, after the work that was queued before; the event of the end.

        The tensor may be freed after `await_event`.
        """
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            tensor.copy_(host, non_blocking=True)
        return self._stream.record_event()

    def await_event(self, event: torch.Event) -> None:
        """Let the stream that computes now wait for a copy; the host does not."""
        torch.accelerator.current_stream(self._device).wait_event(event)

    def arrived(self, tensor: torch.Tensor, event: torch.Event) -> torch.Tensor:
        """What `up` brought, for the stream that computes now, which waits for it; the host does not."""
        self.await_event(event)
        tensor.record_stream(torch.accelerator.current_stream(self._device))
        return tensor
