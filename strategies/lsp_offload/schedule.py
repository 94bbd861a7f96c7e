"""Three lanes that work beside the computation: device to host, CPU update, host to device.

The backward pass submits each layer's image as soon as its gradient is there.  Three lanes carry it on, one layer
each at a time, so that one layer crosses the bus while another is updated and a third is still being computed.  The
next forward pass waits for each layer's own event, so no layer ever computes with old weights: the trajectory is that
of the sequential order, bit by bit.

Order: where updates wait for the end of the backward pass (clipping needs the norm of all), the shallowest go first,
because the next forward pass needs them first.  Else layers from `transition` on, which the backward pass reaches
first, go first come, first served; the shallow ones below it before all that still waits, the shallowest first.
Source: LSP-Offload, arXiv 2406.10181, section 5 (its code orders modules; layers are ordered here).
"""

from __future__ import annotations

import atexit
import heapq
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from strategies.measure.timeline import Span

if TYPE_CHECKING:
    import torch

LANES = ("down", "update", "up")  # device to host, CPU, host to device


@dataclass(order=True)
class _Waiting:
    rank: tuple[int, int]
    layer: int = field(compare=False)
    stages: dict[str, Callable[[], None]] = field(compare=False)
    done: threading.Event = field(compare=False)
    gate: Future[Any] | None = field(compare=False)


class Lanes:
    """Three workers with a queue each.  With `overlapped=False` the caller does all of it, in order: the baseline."""

    def __init__(self, transition: int = 0, overlapped: bool = True) -> None:
        self.transition, self.overlapped = transition, overlapped
        self.spans: list[Span] = []
        self._events: dict[int, threading.Event] = {}
        self._queues: dict[str, list[_Waiting]] = {lane: [] for lane in LANES}
        self._change = threading.Condition()
        self._sequence = itertools.count()
        self._error: BaseException | None = None
        self._is_open = True
        self._threads = [threading.Thread(target=self._serve, args=(lane,), daemon=True) for lane in LANES]
        if overlapped:
            for thread in self._threads:
                thread.start()
            atexit.register(self.close)  # a thread inside torch when the interpreter ends takes the process down

    def submit(self, layer: int, stages: dict[str, Callable[[], None]], gate: Future[Any] | None = None) -> None:
        """Let a layer's `stages` (one call a lane) be done in the order of the lanes; `wait(layer)` waits for the last.

        Its update does not begin before `gate` is done.
        """
        done = self._events[layer] = threading.Event()
        if not self.overlapped:
            for lane in LANES:
                self._timed(lane, layer, stages[lane])
            done.set()
            return
        as_it_comes = gate is None and layer >= self.transition
        rank = (1, next(self._sequence)) if as_it_comes else (0, layer)
        with self._change:
            heapq.heappush(self._queues[LANES[0]], _Waiting(rank, layer, stages, done, gate))
            self._change.notify_all()
        if gate is not None:
            gate.add_done_callback(lambda _: self._wake())

    def wait(self, layer: int) -> None:
        """Until a layer's newest update is there.  Raises what a lane raised: no later stage of that layer has run."""
        event = self._events.get(layer)
        if event:
            event.wait()
        self._raise()

    def wait_all(self) -> None:
        for layer in list(self._events):
            self.wait(layer)

    def abandon(self) -> None:
        """Until every lane is idle; what failed is forgotten, since its layers keep their weights."""
        for event in list(self._events.values()):
            event.wait()
        self._error = None

    def take_spans(self) -> list[Span]:
        """What was done since the last call."""
        spans, self.spans = self.spans, []
        return spans

    def close(self) -> None:
        with self._change:
            self._is_open = False
            self._change.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        atexit.unregister(self.close)

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _timed(self, lane: str, layer: int, call: Callable[[], None]) -> None:
        start = time.perf_counter()
        call()
        self.spans.append(Span(lane, layer, start, time.perf_counter()))

    def _wake(self) -> None:
        with self._change:
            self._change.notify_all()

    def _has_work(self, lane: str) -> bool:
        first = next(iter(self._queues[lane]), None)
        return first is not None and (lane != "update" or first.gate is None or first.gate.done())

    def _serve(self, lane: str) -> None:
        following = LANES[LANES.index(lane) + 1 :][:1]
        while True:
            with self._change:
                self._change.wait_for(lambda: self._has_work(lane) or not self._is_open)
                if not self._has_work(lane):
                    return
                waiting = heapq.heappop(self._queues[lane])
            try:
                self._timed(lane, waiting.layer, waiting.stages[lane])
            except BaseException as error:  # kept for the thread that waits; the layer keeps its old weights
                self._error = self._error or error
                waiting.done.set()
                continue
            if not following:
                waiting.done.set()
                continue
            with self._change:
                heapq.heappush(self._queues[following[0]], waiting)
                self._change.notify_all()


class Step:
    """What the lanes must know of a step, some of it when it ends."""

    def __init__(self, max_grad_norm: float) -> None:
        self.max_grad_norm = max_grad_norm
        self.squares: dict[int, torch.Tensor] = {}
        self.norm: Future[float | None] = Future()  # None = the step was cancelled

    def factor(self) -> float | None:
        """What gradients are multiplied by, as torch.nn.utils.clip_grad_norm_; None = not at all."""
        if not self.max_grad_norm:
            return 1.0
        norm = self.norm.result()
        return None if norm is None else min(1.0, self.max_grad_norm / (norm + 1e-6))
