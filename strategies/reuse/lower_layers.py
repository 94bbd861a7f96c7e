"""What frozen lower layers make of a sample, kept from its first pass for all later ones.

Below the first layer that trains nothing changes from step to step: a sample's hidden state there is the same in every
epoch.  It is kept as it left the last of those layers, in its own precision, on the host (kept_states.py).  Products of
other numbers of rows may round in another order: what is kept is what one pass computed, which a row of the same
samples repeats bit by bit and another row up to rounding.

Legend: T tokens of a packed row, L of a document, H hidden size.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from strategies.model.architecture import architecture_of, decoder_layers
from strategies.reuse.kept_states import KeptStates, StatesInMemory
from strategies.reuse.tree import PrefixTree

_BEHIND = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "norm_f")  # modules after the layers


class LowerLayers:
    """The hidden states of samples above a model's frozen lower layers, by the samples' numbers."""

    def __init__(self, model: Any, states: KeptStates | None = None, stream: Any = None) -> None:
        """`states` keeps them, by default in memory; on a GPU `stream` is its `SideStream` (step/side_stream.py).

        Raises ValueError, with the reason, for a model of which no layer can be skipped.
        """
        self._model, self._layers = model, list(_frozen_layers(model))
        self._above = list(decoder_layers(model))[len(self._layers) :]
        self._states, self._stream = StatesInMemory() if states is None else states, stream
        below = self.modules_below()
        tensors = [tensor for one in below for tensor in (*one.parameters(recurse=False), *one.buffers(recurse=False))]
        self._below = [tensor for tensor in tensors if not tensor.requires_grad]
        self._made_with = self._versions()
        self._leaving: tuple[Sequence[int], DocumentParts, Any] | None = None  # a row on its way from the device
        self._ahead: tuple[Sequence[int], Any] | None = None  # a row on its way to the device
        self._is_tuple = False
        self._num_known = 0

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def num_bytes(self) -> int:
        """That are kept."""
        self._arrive()
        return self._states.num_bytes

    def modules_below(self) -> list[Any]:
        """All modules of the model but those of the layers that are always computed."""
        above = {id(module) for layer in self._above for module in layer.modules()}
        return [module for module in self._model.modules() if id(module) not in above]

    def forget(self) -> None:
        """Keep nothing any more."""
        self._leaving = self._ahead = None
        self._states.clear()
        self._num_known = 0

    def count(self) -> int:
        """Tokens that did not pass the lower layers since this was last asked."""
        counted, self._num_known = self._num_known, 0
        return counted

    def expect(self, sample_ids: Sequence[int], parts: DocumentParts) -> None:
        """The row that is served next: what is known of it begins its way, to a GPU or from the disk."""
        if self._stream is None:
            self._states.expect(sample_ids)
        elif (row := self._send(sample_ids, parts)) is not None:
            self._ahead = tuple(sample_ids), row

    @contextlib.contextmanager
    def serve(self, sample_ids: Sequence[int], parts: DocumentParts) -> Iterator[None]:
        """Inside the block the model computes one packed row of these samples, without what is known of them already.

        All of a row's samples must be known; else the row passes all layers, and what becomes of it is kept.
        """
        if (hidden_TH := self._known_row(sample_ids, parts)) is not None:
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
            self._keep(sample_ids, parts, found[0])

    def _note(self, output: Any) -> torch.Tensor:
        self._is_tuple = isinstance(output, tuple)
        return (output[0] if self._is_tuple else output).detach()[0]

    def _versions(self) -> tuple[Any, ...]:
        """What changes with a weight below the first trained layer, and with the precision that it is multiplied in."""
        kind = self._below[0].device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return precision, *(tensor._version for tensor in self._below)

    def _known_row(self, sample_ids: Sequence[int], parts: DocumentParts) -> torch.Tensor | None:
        """What the lower layers make of a row (T, H), on the model's device; None where that is not known."""
        if (now := self._versions()) != self._made_with:
            self.forget()
            self._made_with = now
        ahead, self._ahead = self._ahead, None
        sent = ahead[1] if ahead and ahead[0] == tuple(sample_ids) else self._send(sample_ids, parts)
        return sent if sent is None or self._stream is None else self._stream.arrived(*sent)

    def _send(self, sample_ids: Sequence[int], parts: DocumentParts) -> Any:
        """A known row: itself on a CPU, to a GPU as `SideStream.up` gives it; None where it is not known."""
        self._arrive()
        if not all(number in self._states for number in sample_ids):
            return None
        known = [self._states.get(number) for number in sample_ids]
        documents = [states_LH for states_LH in known if states_LH is not None]
        if len(documents) < len(known):
            return None
        hidden_TH = parts.row(documents)
        return hidden_TH if self._stream is None else self._stream.up(hidden_TH.pin_memory())

    def _keep(self, sample_ids: Sequence[int], parts: DocumentParts, hidden_TH: torch.Tensor) -> None:
        if self._stream is None:
            self._put(sample_ids, parts, hidden_TH)
        else:  # taken in when it is here: nobody waits for it
            self._arrive()
            self._leaving = sample_ids, parts, self._stream.down(hidden_TH)

    def _arrive(self) -> None:
        """Take in the row that is on its way from the device."""
        leaving, self._leaving = self._leaving, None
        if leaving is not None:
            sample_ids, parts, (hidden_TH, event) = leaving
            event.synchronize()
            self._put(sample_ids, parts, hidden_TH)

    def _put(self, sample_ids: Sequence[int], parts: DocumentParts, hidden_TH: torch.Tensor) -> None:
        for number, hidden_LH in zip(sample_ids, parts.documents(hidden_TH), strict=True):
            if number not in self._states:
                self._states.put(number, hidden_LH)

    @contextlib.contextmanager
    def _skipping(self, hidden_TH: torch.Tensor) -> Iterator[None]:
        """The lower layers hand on what they are handed, and the last of them what was kept."""

        def hand_on(hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
            return (hidden_states,) if self._is_tuple else hidden_states

        def hand_over(hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
            kept = hidden_TH[None].to(hidden_states.device)
            if (missing := hidden_states.shape[1] - kept.shape[1]) > 0:  # of a row that was filled up
                kept = F.pad(kept, (0, 0, 0, missing))
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
        """The tokens of each document (L, H); what a row was filled up with stands behind them."""
        parts = row_TH[: sum(self._lengths)].split(list(self._lengths))
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
    trunk, _, own_name = architecture_of(inner).layers.rpartition(".")
    for name, module in inner.get_submodule(trunk).named_children():  # positions, or the embedding's norm
        if name not in (own_name, *_BEHIND) and any(p.requires_grad for p in module.parameters()):
            raise ValueError(f"its {name} trains, which may come before the layers")
    yield from frozen
