"""What streamed weights keep on the device and on the host, and send over the bus.  Pure arithmetic.

Legend: g bytes of an element outside the layers, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from clusters.units import MIB
from strategies.shape import ModelShape
from strategies.workload import BYTES_PER_ELEMENT, Techniques

LEAST_SLICE_BYTES = 64 * MIB  # of the output matrix; larger where a layer is larger
POSITIONS = 2048  # whose logits of one slice are held at once


@dataclass(frozen=True)
class FrozenParts:
    """Bytes of frozen weights by where they lie; an embedding that is also the output matrix counts once."""

    layers: float
    largest_layer: float
    embedding: float
    output: float  # what the output matrix sends; the embedding's bytes where they are one
    rest: float  # norms at the end, positions, projections: always on the device
    is_tied: bool

    @property
    def host_bytes(self) -> float:
        return self.layers + self.embedding + (0.0 if self.is_tied else self.output)

    @property
    def slice_bytes(self) -> float:
        return min(self.output, max(LEAST_SLICE_BYTES, self.largest_layer))

    def device_bytes(self, num_visitors: int) -> float:
        """What stays, and the layers or slices that are there at once."""
        return self.rest + num_visitors * max(self.largest_layer, self.slice_bytes)

    def sent_bytes(self, first_layer: int, num_layers: int) -> float:
        """A micro-batch: up all layers and the output matrix, down to the lowest layer in which something trains.

        The output matrix's last slice is still there on the way down.
        """
        again = (num_layers - first_layer) / num_layers
        return self.layers * (1 + again) + 2 * self.output - self.slice_bytes


def split(shape: ModelShape, techniques: Techniques, frozen_bytes: float) -> FrozenParts:
    """Frozen weights of that many bytes in all, whatever form the layers' have."""
    g = BYTES_PER_ELEMENT[techniques.dtype]
    tokens = float(g * shape.vocab_size * shape.embedding_width)
    embedding, output = tokens * shape.has_embedding, tokens * shape.has_output
    is_tied = shape.tied_embeddings and shape.has_embedding and shape.has_output
    outside = embedding + (0.0 if is_tied else output)
    final_norm = shape.hidden_size * (1 + shape.family.norm_bias) * shape.family.final_norm * shape.has_output
    rest = g * (shape.num_embedding_parameters + final_norm) - outside
    layers = max(0.0, frozen_bytes - outside - rest)
    return FrozenParts(layers, layers * _largest_share(shape), embedding, output, rest, is_tied)


@lru_cache(maxsize=64)
def _largest_share(shape: ModelShape) -> float:
    """Of all layers' weights, the part that the largest layer has."""
    experts = shape.num_expert_parameters / max(1, shape.num_expert_layers)
    sizes = [
        sum(one.num_parameters for one in shape.linears_of(layer)) + (0 if layer in shape.dense_layers else experts)
        for layer in range(shape.num_layers)
    ]
    return max(sizes) / sum(sizes)
