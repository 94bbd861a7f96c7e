"""A memory beside an MLP: y = MLP(x) + what the rows that x chooses add to it.

The rows lie in host memory, whatever the device; for a pass the different rows of its tokens are brought to the device
over the transport, which counts them.  Values begin at zero, so a memory that nothing has trained adds nothing.

Legend: M rows, D width, 2D numbers of a row (its key, then its value), T tokens, K rows a token, U different rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from strategies.lsp_offload.transport import Transport
from strategies.model.architecture import architecture_of, decoder_layers
from strategies.shape import ModelShape
from strategies.sparse_memory.product import Brought, read_rows
from strategies.sparse_memory.router import ProductKeys

Observer = Callable[[torch.Tensor, torch.Tensor], None]  # vectors of tokens (T, D), the rows they read (T, K)


@dataclass(frozen=True)
class MemorySizes:
    """What one memory has, whichever MLP it stands beside."""

    width: int
    num_keys: int  # sub-keys of each half: num_keys ** 2 rows
    top_k: int


class Carrier(Protocol):
    """Who brings rows to the device, and takes their gradients."""

    @property
    def transport(self) -> Transport: ...

    def before(self, layer: int) -> None:
        """Until the rows of a layer have moved by every update so far."""

    def take(self, layer: int, places_U: torch.Tensor, gradient_U2D: torch.Tensor, readers_U: torch.Tensor) -> None:
        """The gradient of rows, and how many tokens read each whose output matters; `places_U` lie on the host."""
        ...


@dataclass
class ReadingCarrier:
    """Of a model that does not train."""

    transport: Transport

    def before(self, layer: int) -> None: ...

    def take(self, layer: int, places_U: torch.Tensor, gradient_U2D: torch.Tensor, readers_U: torch.Tensor) -> None: ...


class RowMemory(torch.nn.Module):
    """Rows on the host, a router on the device.  `wire` is the precision in which rows and gradients travel."""

    carrier: Carrier

    def __init__(self, layer: int, sizes: MemorySizes, device: torch.device, wire: torch.dtype) -> None:
        super().__init__()
        self.layer, self.wire, self.scale = layer, wire, 1 / sizes.top_k
        host = device if device.type == "meta" else torch.device("cpu")
        rows_M2D = torch.zeros(sizes.num_keys**2, 2 * sizes.width, device=host)
        self.rows = torch.nn.Parameter(rows_M2D, requires_grad=False)
        self.router = ProductKeys(sizes.width, sizes.num_keys, sizes.top_k, device)
        self.observer: Observer | None = None

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Random keys and sub-keys, the same on every machine; values of zero."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + self.layer) % 2**63)
        keys_MD, values_MD = self.rows.chunk(2, dim=1)
        keys_MD.normal_(0.0, 1 / math.sqrt(keys_MD.shape[1]), generator=generator)
        values_MD.zero_()
        self.router.draw(generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TD = x.flatten(0, -2)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            rows_TK = self.router.choose(x_TD)
            if self.observer is not None:
                self.observer(x_TD.detach(), rows_TK)
            rows_U, places_TK = rows_TK.unique(return_inverse=True)
            places_U, brought_U2D = self._bring(rows_U)
        layer, carrier = self.layer, self.carrier

        def sink(gradient_U2D: torch.Tensor, readers_U: torch.Tensor) -> None:
            carrier.take(layer, places_U, gradient_U2D, readers_U)

        with torch.autocast(x.device.type, enabled=False):
            y_TD = read_rows(x_TD, self.rows, Brought(brought_U2D, places_TK, self.scale), sink)
        return y_TD.view_as(x)

    def _bring(self, rows_U: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of rows on the host (U,) in int64, and those rows where the numbers came from (U, 2D)."""
        self.carrier.before(self.layer)
        transport, device = self.carrier.transport, rows_U.device
        named = transport.down(rows_U.int(), transport.mark())
        places_U = named.long()
        transport.buffers.give(named)
        leaving = transport.buffers.take((len(places_U), self.rows.shape[1]), self.wire)
        if self.wire == self.rows.dtype:
            torch.index_select(self.rows, 0, places_U, out=leaving)
        else:
            leaving.copy_(self.rows[places_U])
        arrived: list[torch.Tensor] = []
        transport.up(leaving, device, lambda there: arrived.append(there.clone() if there is leaving else there))
        if device.type == "cuda":  # it was made by the stream of the copy
            arrived[0].record_stream(torch.cuda.current_stream(device))
        return places_U, arrived[0]


def attach(
    model: Any, layers: Sequence[int], sizes: MemorySizes, wire: torch.dtype, device: torch.device
) -> dict[str, RowMemory]:
    """Put an empty memory beside the MLP of each of these layers; the memories by name, lowest layer first."""
    at = ModelShape.from_config(model.config.to_dict()).family.mlp_at
    path, blocks, found = architecture_of(model).layers, decoder_layers(model), {}
    for layer in sorted(layers):
        mlp, memory = blocks[layer].get_submodule(at), RowMemory(layer, sizes, device, wire)
        mlp.add_module("memory", memory)
        mlp.register_forward_hook(_add_memory)
        found[f"{path}.{layer}.{at}.memory"] = memory
    return found


def _add_memory(mlp: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output + mlp.memory(inputs[0])
