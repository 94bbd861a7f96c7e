"""AdamW on rows of memories in host memory.

A pass brings the different rows that its tokens read to the device, and its backward pass sends their gradients back;
both cross the bus in the precision of computing.  The host adds gradients of a step's passes up in fp32 and moves only
rows whose sum is not zero, each by an AdamW with its own number of steps.  On a GPU gradients leave, and rows move,
beside the computation; a layer waits for its own rows before it reads them, so no pass reads old ones.

Rows of padding, and of tokens that the loss does not depend on, have gradients of exactly zero and stay as they are:
what moves does not depend on how samples are laid out in passes.

Legend: U different rows of a pass, 2D numbers of a row, M rows of a memory, P rows that move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from strategies.lsp_offload.adam import AdamNumbers
from strategies.lsp_offload.optimizer import LaneFailed, Route
from strategies.lsp_offload.schedule import LANES
from strategies.lsp_offload.transport import EmulatedBus
from strategies.sparse_memory.layer import RowMemory
from strategies.sparse_memory.row_adam import move_rows, zero_row_moments
from strategies.sparse_memory.slots import BackgroundCounts, most_specific


@dataclass(frozen=True)
class SpecificRows:
    """That a step moves the rows alone that are most specific to its data."""

    most: int  # rows of a memory
    background: dict[int, BackgroundCounts]  # by layer


class RowSums:
    """Gradients of one memory's rows since the last update, summed on the host."""

    def __init__(self, rows: torch.nn.Parameter) -> None:
        self._rows = rows
        self._gradient_M2D: torch.Tensor | None = None  # kept from step to step: zero but for rows that were added
        self._reads_M: torch.Tensor | None = None
        self._added: list[torch.Tensor] = []

    def add(self, places_U: torch.Tensor, gradient_U2D: torch.Tensor, readers_U: torch.Tensor | None) -> None:
        """Rows are different ones."""
        if self._gradient_M2D is None:
            self._gradient_M2D = torch.zeros(self._rows.shape)
        self._rows.grad = self._gradient_M2D
        self._gradient_M2D.index_add_(0, places_U, gradient_U2D.float())
        self._added.append(places_U)
        if readers_U is not None:
            if self._reads_M is None:
                self._reads_M = torch.zeros(len(self._rows), dtype=torch.int32)
            self._reads_M.index_add_(0, places_U, readers_U)

    @property
    def places_P(self) -> torch.Tensor:
        """Rows whose gradient is not zero, in ascending order."""
        if not self._added:
            return torch.zeros(0, dtype=torch.int64)
        places_U = torch.cat(self._added).unique()
        return places_U[self.of(places_U).any(dim=1)]

    def of(self, places_P: torch.Tensor) -> torch.Tensor:
        """A copy of the gradient of some rows."""
        assert self._gradient_M2D is not None
        return self._gradient_M2D[places_P]

    def reads_of(self, places_P: torch.Tensor) -> torch.Tensor:
        assert self._reads_M is not None
        return self._reads_M[places_P]

    def take(self) -> list[torch.Tensor]:
        """What `clear` must be given once the rows have moved; from now on sums of the next step are added."""
        added, self._added, self._rows.grad = self._added, [], None
        return added

    def clear(self, added: Sequence[torch.Tensor]) -> None:
        for places_U in added:
            for kept in (self._gradient_M2D, self._reads_M):
                if kept is not None:
                    kept[places_U] = 0


class RowAdamW(torch.optim.Optimizer):
    """The contract's `Streaming`.  Of each memory `state` holds two moments and the steps of every row."""

    def __init__(
        self, memories: Sequence[RowMemory], route: Route, numbers: AdamNumbers, specific: SpecificRows | None = None
    ) -> None:
        rates = {"lr": numbers.learning_rate, "base_lr": numbers.learning_rate}
        super().__init__([{"params": [one.rows for one in memories], **rates}], {})
        self.transport, self.lanes, self.numbers = route.transport, route.lanes, numbers
        self.device = memories[0].router.keys.device
        self.summed: Sequence[torch.nn.Parameter] = [one.rows for one in memories]
        self.drops_gradients = False  # of passes that only look
        self._specific = specific
        self._memories = {one.layer: one for one in memories}
        self._sums = {one.layer: RowSums(one.rows) for one in memories}
        self._reported, self._moved = (0, 0), 0
        for one in memories:
            one.rows.requires_grad_(True)
            one.carrier = self

    # What a memory calls.

    def before(self, layer: int) -> None:
        self.lanes.wait(layer)

    def take(self, layer: int, places_U: torch.Tensor, gradient_U2D: torch.Tensor, readers_U: torch.Tensor) -> None:
        if self.drops_gradients:
            return
        leaving = [gradient_U2D.to(self._memories[layer].wire)] + ([readers_U] if self._specific else [])
        mark, arrived = self.transport.mark(), list[torch.Tensor]()

        def down() -> None:
            arrived.extend(self.transport.down(one, mark) for one in leaving)
            leaving.clear()

        def add() -> None:
            self._sums[layer].add(places_U, arrived[0], arrived[1] if self._specific else None)
            for one in arrived:
                self.transport.buffers.give(one)

        self.lanes.submit(layer, {"down": down, "update": add, "up": _nothing})

    # What the training loop calls.

    def last_pass(self, max_grad_norm: float) -> None: ...

    def update(self, max_grad_norm: float) -> torch.Tensor:
        """End a step; the norm of the gradients of rows that move.  They move in their own time: `settle` waits.

        Raises LaneFailed where a gradient is not finite; then no row has moved.
        """
        self.settle()
        chosen = {layer: self._choose(layer) for layer in sorted(self._memories)}
        some = [layer for layer, places_P in chosen.items() if len(places_P)]
        moving = {layer: (chosen[layer], self._sums[layer].of(chosen[layer])) for layer in some}
        squares = [gradient.square().sum() for _, gradient in moving.values()] or [torch.zeros(())]
        grad_norm = torch.stack(squares).sum().sqrt()
        if not torch.isfinite(grad_norm):
            self.zero_grad()
            raise LaneFailed("a gradient is not finite; no row has moved")
        factor = min(1.0, max_grad_norm / (float(grad_norm) + 1e-6)) if max_grad_norm else 1.0
        numbers = replace(self.numbers, learning_rate=self.param_groups[0]["lr"])
        for layer in chosen:
            self._move(layer, moving.get(layer), factor, numbers)
        self._moved = sum(map(len, chosen.values()))
        return grad_norm

    def _choose(self, layer: int) -> torch.Tensor:
        places_P = self._sums[layer].places_P
        if self._specific is None or not len(places_P):
            return places_P
        background, reads_P = self._specific.background[layer], self._sums[layer].reads_of(places_P)
        return most_specific(places_P, reads_P, background, self._specific.most)

    def _move(
        self, layer: int, moving: tuple[torch.Tensor, torch.Tensor] | None, factor: float, numbers: AdamNumbers
    ) -> None:
        rows, sums = self._memories[layer].rows, self._sums[layer]
        state, added = self.state[rows], sums.take()
        if "step" not in state:
            state |= zero_row_moments(rows)

        def move() -> None:
            if moving is not None:
                places_P, gradient_P2D = moving
                move_rows(rows, state, places_P, gradient_P2D.mul_(factor), numbers)
            sums.clear(added)

        self.lanes.submit(layer, {"down": _nothing, "update": move, "up": _nothing})

    def settle(self) -> None:
        """Until every gradient is added and every row has moved.  Raises LaneFailed."""
        self.lanes.wait_all()

    def collect(self) -> None:
        self.settle()

    def home(self, parameter: torch.nn.Parameter, key: str) -> torch.device:
        """The host, for all of it."""
        return torch.device("cpu")

    def report(self) -> dict[str, Any]:
        """Bytes over the bus and seconds of each lane since the last report, and rows that the last update moved."""
        down, up = self._reported
        self._reported = self.transport.down_bytes, self.transport.up_bytes
        busy: dict[str, float] = dict.fromkeys(LANES, 0.0)
        for lane, _, start_s, end_s in self.spans():
            busy[lane] += end_s - start_s
        return {
            "bus_down_bytes": self.transport.down_bytes - down,
            "bus_up_bytes": self.transport.up_bytes - up,
            "lane_s": {lane: round(seconds, 4) for lane, seconds in busy.items()},
            "rows_moved": self._moved,
        }

    def spans(self) -> list[tuple[str, int, float, float]]:
        return [(span.lane, span.layer, span.start_s, span.end_s) for span in self.lanes.take_spans()]

    def emulate_bus(self, bytes_per_s: float) -> None:
        if not isinstance(self.transport, EmulatedBus):
            raise ValueError("this machine has a real bus")
        self.transport.bytes_per_s = bytes_per_s

    # What torch calls.

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """As a plain optimizer: no clipping, and every row has moved."""
        self.update(0.0)
        self.settle()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what this step has gathered."""
        self.lanes.abandon()
        for sums in self._sums.values():
            sums.clear(sums.take())

    def close(self) -> None:
        self.lanes.close()


def _nothing() -> None:
    """A lane has no part in this."""
