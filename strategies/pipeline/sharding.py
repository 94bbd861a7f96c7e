"""Checkpoints of a training in stages: gathered on the first worker, they are those of a model in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from strategies.step.state import gather_own, restore_own
from strategies.train_setup import TrainSetup, TrainState


class StageSharding:
    """`Sharding` by layers: `ranks` hold the stages of one pipeline, the first of them writes.

    Workers of other pipelines hold the same and send nothing.
    """

    def __init__(self, setup: TrainSetup, ranks: Sequence[int], order: Sequence[str]) -> None:
        self._setup, self._ranks, self._order = setup, ranks, order
        self._rank = dist.get_rank()

    def gather(self) -> TrainState | None:
        """All workers call it; tensors travel one after the other, so no worker holds more than the whole."""
        if self._rank not in self._ranks:
            return None
        own = gather_own(self._setup)
        if self._rank != self._ranks[0]:
            self._send(own)
            return None
        whole = TrainState(dict(own.weights), dict(own.moments))
        for peer in self._ranks[1:]:
            self._receive(peer, whole)
        weights = {name: whole.weights[name] for name in self._order}
        return TrainState(weights, {name: whole.moments[name] for name in self._order if name in whole.moments})

    def restore(self, state: TrainState) -> None:
        restore_own(self._setup, state)

    def forget(self) -> None:
        self._setup.optimizer.state.clear()

    def _send(self, own: TrainState) -> None:
        places = _places(own)
        described = [(place, tuple(tensor.shape), tensor.dtype) for place, tensor in places]
        dist.send_object_list([described], self._ranks[0])
        for _, tensor in places:
            if tensor.numel():
                dist.send(tensor.contiguous(), self._ranks[0])

    def _receive(self, peer: int, whole: TrainState) -> None:
        described: list[Any] = [None]
        dist.recv_object_list(described, peer)
        for (name, key), shape, dtype in described[0]:
            tensor = torch.empty(shape, dtype=dtype)
            if tensor.numel():
                dist.recv(tensor, peer)
            if key is None:
                whole.weights[name] = tensor
                whole.moments.setdefault(name, {})
            else:
                whole.moments.setdefault(name, {})[key] = tensor


def _places(state: TrainState) -> list[tuple[tuple[str, str | None], torch.Tensor]]:
    """Every tensor of a state with its weight's name and, for the optimizer's, its own."""
    weights = [((name, None), tensor) for name, tensor in state.weights.items()]
    moments = [((name, key), tensor) for name, held in state.moments.items() for key, tensor in held.items()]
    return [*weights, *moments]
