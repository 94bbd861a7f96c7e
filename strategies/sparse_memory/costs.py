"""Rows, bytes and seconds of a step with memories beside MLPs, before anything runs.  Pure.

Legend: M rows of a memory, N = sqrt(M) sub-keys of each half, D width, K rows a token, U different rows of a pass of T
tokens, L memories; g bytes of an element where it is computed and on the bus.

Of T tokens that each read K rows of M, all as likely, U = M (1 - (1 - K / M)^T) different ones are read: text repeats
itself, so fewer are (LOG.md has how many).  A row is 2 D numbers; each pass sends 4 U bytes of their names and 2 U D g
of gradients to the host, and 2 U D g of rows to the device, again where activations are computed again.  The host
holds 16 bytes of each of the 2 M D numbers: weight, summed gradient, two moments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from strategies.contract import MemoryEstimate
from strategies.cost.memory import Footprint, Streamed
from strategies.cost.plan import Costs
from strategies.cost.work import Work
from strategies.shape import ModelShape
from strategies.workload import BYTES_PER_ELEMENT, Techniques

_NAME_BYTES = 4  # of a row's number on the bus, and of how many tokens read it
_STEP_BYTES = 4  # of a row's number of steps
_AT_ONCE = 1 << 22  # as in product.py
_COPIES = 6  # of numbers of rows that are copied for tokens at a time, in fp32, in a backward pass (product.py)
_MOVED_BYTES = 40.0  # read and written for each number of a row that a token reads: copies, products, sums of gradients
_OPERATIONS = 60  # kernels of a memory's forward pass


@dataclass(frozen=True)
class MemoryCosts:
    """What memories of one size beside some layers cost."""

    shape: ModelShape
    techniques: Techniques
    num_rows: int
    top_k: int
    layers: tuple[int, ...]
    counts_reads: bool  # rows are chosen by how often they are read

    @property
    def element_bytes(self) -> int:
        return BYTES_PER_ELEMENT[self.techniques.dtype]

    @property
    def num_trainable(self) -> int:
        return len(self.layers) * self.num_rows * 2 * self.shape.hidden_size

    @property
    def router_bytes(self) -> float:
        """On the device: what depends on the number of rows there, and only with its square root."""
        width = self.shape.hidden_size
        return len(self.layers) * 4.0 * (self.num_rows**0.5 * width + 2 * width)

    @property
    def host_bytes(self) -> float:
        counted = _STEP_BYTES + (2 * _NAME_BYTES if self.counts_reads else 0)
        return 16.0 * self.num_trainable + len(self.layers) * counted * self.num_rows

    @property
    def checkpoint_bytes(self) -> float:
        return 12.0 * self.num_trainable + len(self.layers) * _STEP_BYTES * self.num_rows + self.router_bytes

    def different_rows(self, tokens: float) -> float:
        """Of one memory, that a pass of so many tokens reads; at most, since text repeats itself."""
        return self.num_rows * (1 - (1 - min(1.0, self.top_k / self.num_rows)) ** tokens)

    def bus_bytes(self, tokens: float) -> tuple[float, float]:
        """(to the host, to the device) of one pass of so many tokens, all memories."""
        row_bytes = 2.0 * self.shape.hidden_size * self.element_bytes
        return self.bytes_of_rows(self.different_rows(tokens), row_bytes)

    def bytes_of_rows(self, different: float, row_bytes: float) -> tuple[float, float]:
        """The same of so many different rows a memory."""
        visits = 1 + self.techniques.gradient_checkpointing
        named = _NAME_BYTES * (visits + self.counts_reads)
        return len(self.layers) * different * (row_bytes + named), len(self.layers) * different * row_bytes * visits

    def with_copies(self, memory: MemoryEstimate, tokens: float) -> MemoryEstimate:
        """Beside what is alive when the backward pass begins, what copies of rows take in that of the memories.

        By then what the layers above have saved, and the logits, are free again.
        """
        shape, lowest, highest = self.shape, min(self.layers), max(self.layers)
        copies = _COPIES * 4.0 * min(_AT_ONCE, tokens * self.top_k * shape.hidden_size)
        scores = 16.0 * tokens * self.num_rows**0.5  # of both halves, twice for a moment
        above = (shape.num_layers - 1 - highest) / (shape.num_layers - lowest)
        more = max(0.0, max(copies, scores) - above * memory.activations_bytes - memory.logits_bytes)
        low, high, buffers = memory.low_bytes + more, memory.high_bytes + more, memory.buffers_bytes + more
        return replace(memory, buffers_bytes=buffers, low_bytes=low, high_bytes=high)

    def costs(self, tokens: float, on_cpu: bool) -> Costs:
        """Of a pass of so many tokens."""
        shape, g, width = self.shape, self.element_bytes, self.shape.hidden_size
        count, above = len(self.layers), shape.num_layers - min(self.layers)
        rows_bytes = 2.0 * width * self.different_rows(tokens)
        on_device = g * shape.num_parameters + self.router_bytes + (self.host_bytes if on_cpu else 0.0)
        footprint = Footprint(
            weights_bytes=on_device,
            num_trainable=self.num_trainable,
            stream_bytes=g,
            inputs_per_token=(g * width + 8.0 * self.top_k) * count / above,
            cast_bytes=g * rows_bytes * count,
            first_layer=min(self.layers),
            streamed=Streamed(0.0, (4 + g) * rows_bytes, 0.0 if on_cpu else self.host_bytes),
        )
        chosen = self.top_k * 2 * width
        work = Work(
            trains_weights=False,
            adapter_parameters=round(count * (chosen + self.num_rows**0.5 * width / 3)),  # routers have no gradients
            adapter_inputs=round(chosen * count / shape.num_layers),
            adapter_bytes=_MOVED_BYTES,
            adapter_operations=round(_OPERATIONS * count / shape.num_layers),
            num_adapters=1,
            first_layer=min(self.layers),
        )
        return Costs(footprint, work)
