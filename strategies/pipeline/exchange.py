"""Hidden states and their gradients between neighbouring stages, by torch.distributed's point-to-point messages.

gloo moves a message only when both sides have posted it, so receives are posted before they are needed: with the
receive posted when it is waited for, a link of 100 Mbit took twice as long.  gloo serves GPUs as well, by way of the
host: on Ethernet that copy is 1 to 3 % of the message's time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from strategies.pipeline import wire as form
from strategies.workload import Wire

_TAGS = 2**14  # of one direction, then they start again: fewer messages are on their way
_MOST_SENT = 64  # messages on their way before a sender waits for the oldest


@dataclass
class Outbox:
    """Sends tensors to one neighbour without waiting for it."""

    peer: int  # its rank
    wire: Wire
    bytes_sent: int = 0
    _sent: deque[tuple[torch.Tensor, Any]] = field(default_factory=deque)  # kept until they have arrived
    _count: int = 0

    def send(self, tensor: torch.Tensor) -> None:
        self.post(form.pack(tensor, self.wire))

    def post(self, flat: torch.Tensor) -> None:
        """Send a packed tensor."""
        work = dist.isend(flat, self.peer, tag=self._count % _TAGS)
        self._sent.append((flat, work))
        self._count += 1
        self.bytes_sent += flat.nbytes
        while self._sent and (len(self._sent) > _MOST_SENT or self._sent[0][1].is_completed()):
            self._sent.popleft()[1].wait()

    def settle(self) -> None:
        """Wait until everything was sent."""
        while self._sent:
            self._sent.popleft()[1].wait()


@dataclass
class Inbox:
    """Receives tensors of known shapes from one neighbour, some of them posted in advance."""

    peer: int
    wire: Wire
    depth: int  # receives posted in advance
    bytes_received: int = 0
    _expected: deque[Sequence[int]] = field(default_factory=deque)  # shapes, in order
    _posted: deque[tuple[Sequence[int], torch.Tensor, Any]] = field(default_factory=deque)
    _count: int = 0

    def expect(self, shapes: Iterable[Sequence[int]]) -> None:
        """Announce the shapes of the next tensors, in their order."""
        self._expected.extend(shapes)
        self._post()

    def wait(self) -> None:
        """Wait for the next tensor."""
        shape, flat, work = self._posted[0]
        if work is not None:  # gloo's wait a second time would be for a second message
            work.wait()
            self._posted[0] = shape, flat, None

    def receive(self) -> torch.Tensor:
        """Wait for the next tensor and unpack it."""
        self.wait()
        shape, flat, _ = self._posted.popleft()
        self.bytes_received += flat.nbytes
        self._post()
        return form.unpack(flat, shape, self.wire)

    def _post(self) -> None:
        while self._expected and len(self._posted) < self.depth:
            shape = self._expected.popleft()
            flat = form.buffer(shape, self.wire)
            self._posted.append((shape, flat, dist.irecv(flat, self.peer, tag=self._count % _TAGS)))
            self._count += 1
