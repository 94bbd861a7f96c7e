"""What frozen lower layers make of a sample, kept from its first pass for all later ones.

Below the first layer that trains nothing changes from step to step: a sample's hidden state there is the same in every
epoch.  It is kept as it left the last of those layers, in its own precision, in the host's memory.  Products of other
numbers of rows may round in another order: what is kept is what one pass computed, not a bit-equal repetition.

Legend: T tokens of a packed row, L of a document, H hidden size.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from strategies.model.architecture import decoder_layers
from strategies.reuse.tree import PrefixTree


class LowerLayers:
    """The hidden states of samples above a model's frozen lower layers, by the samples' numbers."""

    def __init__(self, model: Any) -> None:
        """Raises ValueError, with the reason, for a model of which no layer can be skipped."""
        self._model, self._layers = model, list(_frozen_layers(model))
        self._above = list(decoder_layers(model))[len(self._layers) :]
        self._kept: dict[int, torch.Tensor] = {}
        self._is_tuple = False
        self.num_bytes = 0
        self._num_known = 0

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def modules_below(self) -> list[Any]:
        """All modules of the model but those of the layers that are always computed."""
        above = {id(module) for layer in self._above for module in layer.modules()}
        return [module for module in self._model.modules() if id(module) not in above]

    def forget(self) -> None:
        """Keep nothing any more: to be called whenever something below the first trained layer changes."""
        self._kept.clear()
        self.num_bytes = self._num_known = 0

    def count(self) -> int:
        """Tokens that did not pass the lower layers since this was last asked."""
        counted, self._num_known = self._num_known, 0
        return counted

    @contextlib.contextmanager
    def serve(self, sample_ids: Sequence[int], parts: DocumentParts) -> Iterator[None]:
        """Inside the block the model computes one packed row of these samples, without what is known of them already.

        All of a row's samples must be known; else the row passes all layers, and what becomes of it is kept.
        """
        if all(number in self._kept for number in sample_ids):
            hidden_TH = parts.row([self._kept[number] for number in sample_ids])
            self._num_known += len(hidden_TH)
            with self._skipping(hidden_TH):
                yield
            return
        found: list[torch.Tensor] = []
        handle = self._layers[-1].register_forward_hook(lambda module, inputs, output: found.append(self._note(output)))
        try:
            yield
        finally:
            handle.remove()
        if found:
            self._keep(sample_ids, parts.documents(found[0]))

    def _note(self, output: Any) -> torch.Tensor:
        self._is_tuple = isinstance(output, tuple)
        return (output[0] if self._is_tuple else output).detach()[0]

    def _keep(self, sample_ids: Sequence[int], documents: Sequence[torch.Tensor]) -> None:
        for number, hidden_LH in zip(sample_ids, documents, strict=True):
            if number not in self._kept:
                self._kept[number] = hidden_LH.to("cpu", copy=True)
                self.num_bytes += hidden_LH.nbytes

    @contextlib.contextmanager
    def _skipping(self, hidden_TH: torch.Tensor) -> Iterator[None]:
        """The lower layers hand on what they are handed, and the last of them what was kept."""

        def hand_on(hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
            return (hidden_states,) if self._is_tuple else hidden_states

        def hand_over(hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
            kept = hidden_TH[None].to(hidden_states.device)
            return (kept,) if self._is_tuple else kept

        for layer in self._layers:
            layer.forward = hand_over if layer is self._layers[-1] else hand_on
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward


class DocumentParts:
    """Where the tokens of documents stand in a row: end to end, or as the nodes of a tree."""

    def __init__(self, lengths: Sequence[int], tree: PrefixTree | None = None) -> None:
        self._lengths, self._tree = lengths, tree  # of the documents, or of the nodes

    def documents(self, row_TH: torch.Tensor) -> list[torch.Tensor]:
        """The tokens of each document (L, H)."""
        parts = row_TH.split(list(self._lengths))
        if self._tree is None:
            return list(parts)
        return [torch.cat([parts[node] for node in self._tree.path(end)]) for end in self._tree.ends]

    def row(self, documents: Sequence[torch.Tensor]) -> torch.Tensor:
        """The row (T, H) of some documents (L, H)."""
        if self._tree is None:
            return torch.cat(list(documents))
        return torch.cat([documents[one][begin : begin + size] for one, begin, size in self._tree.pieces()])


def _frozen_layers(model: Any) -> Iterator[Any]:
    """The decoder layers below the first one that trains, where nothing before them trains either."""
    layers = list(decoder_layers(model))
    frozen = list(itertools.takewhile(lambda layer: not any(p.requires_grad for p in layer.parameters()), layers))
    if not frozen:
        raise ValueError("its first layer trains")
    if len(frozen) == len(layers):
        raise ValueError("none of its layers trains")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if any(p.requires_grad for p in inner.get_input_embeddings().parameters()):
        raise ValueError("its embedding trains")
    yield from frozen
