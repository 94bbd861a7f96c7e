"""Repairs an update that ran out of memory on some workers: they copy its result from one on which it went through.

Workers hold the same weights and the same optimizer state, so nothing of the step is lost; an update that broke off has
moved some weights and not others, and must not be repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from orchestrator.errors import NothingFits
from orchestrator.training.parallel import ProcessGroup
from strategies.step.out_of_memory import catch_out_of_memory, release_cache
from strategies.step.state import gather, restore
from strategies.train_setup import TrainSetup, TrainState


class UpdateFailed(Exception):
    """The last update did not go through on some worker; nothing of this step has left yet."""


class Updates:
    """Whether each update went through everywhere; workers learn it while they compute the next step's gradients."""

    def __init__(self, setup: TrainSetup, group: ProcessGroup, is_local: bool, note: Callable[[str], None]) -> None:
        self._setup, self._group, self._note = setup, group, note
        # Another worker has the same state, and none waits for another inside the update.
        own_state = setup.engine or setup.sharding or setup.streaming or is_local
        self.can_repair = group.size > 1 and not own_state and not setup.between
        # Stages have none to copy from, but would wait for each other in the next step: all of them end together.
        self.are_shared = self.can_repair or bool(setup.passes and not setup.engine)
        # What all workers do together around an update, one whose memory ran out in it has missed.
        self.why_not_repaired = "; the method acts between steps on all workers at once" if setup.between else ""
        self._error: str | None = None
        self._sums: Callable[[], list[float]] | None = None
        self._failed: list[float] = []

    def announce(self, error: str | None) -> None:
        """Send the others how this worker's update went: the error where it failed.  Nobody waits for it."""
        if self.are_shared:
            self._error = error
            self._sums = self._group.start_sum(self._group.at_own_rank(float(error is not None)))

    def has_succeeded(self) -> bool:
        """Whether it did on every worker; waits for their reports."""
        if self._sums:
            self._failed, self._sums = self._sums(), None
        return not any(self._failed)

    def check(self) -> None:
        """Raises UpdateFailed where it did not and can be repaired."""
        if self.can_repair and not self.has_succeeded():
            raise UpdateFailed

    def repair(self, scale: dict[str, Any], norm: float) -> tuple[dict[str, Any] | None, float]:
        """Bring workers whose update failed to the state of the first one that has it.

        Collective.  Returns, on a worker that was repaired, the state of the loss scale for a new scaler, and the
        gradients' norm.  Raises NothingFits on all workers where none has it, or none that another can copy, or where
        it does not fit even so.
        """
        error, failed = self._error, self._failed
        reasons = {rank: reason for rank, reason in enumerate(self._group.gather(error)) if reason is not None}
        text = "; ".join(f"worker {rank}: {reason}" for rank, reason in reasons.items())
        if all(failed) or not self.can_repair:
            raise update_does_not_fit(text)
        source = failed.index(0.0)
        if error is not None:
            _forget(self._setup)
        norm, scale, state = _state_of(self._setup, self._group, source, scale, norm)
        with catch_out_of_memory() as shortage:
            if error is not None:
                restore(self._setup, state)
        if still := [reason for reason in self._group.gather(shortage.reason) if reason is not None]:
            raise update_does_not_fit("; ".join(still))
        self._note(f"out of memory in the update; its result was taken from worker {source} ({text})")
        self._error, self._failed = None, []
        return scale if error is not None else None, norm


def update_does_not_fit(reasons: str, why_not_repaired: str = "") -> NothingFits:
    """The error for an update that fits on no worker, or not on this one where another's is of no use."""
    return NothingFits(
        f"the optimizer's update does not fit: {reasons}{why_not_repaired}. Choose a train.optim with less state, or"
        " strategy.offload: optimizer"
    )


def _forget(setup: TrainSetup) -> None:
    """Free gradients and optimizer state, of which the update left a part."""
    setup.optimizer.zero_grad(set_to_none=True)
    setup.optimizer.state.clear()
    release_cache()


def _state_of(
    setup: TrainSetup, group: ProcessGroup, source: int, scale: dict[str, Any], norm: float
) -> tuple[float, dict[str, Any], TrainState]:
    """Norm, loss scale and whole state of the worker of rank `source`, on the CPU of every worker."""
    own = gather(setup) if group.rank == source else None
    about = None
    if own:
        shapes = [{name: _shape(tensor) for name, tensor in own.weights.items()}]
        shapes += [{key: _shape(tensor) for key, tensor in held.items()} for held in own.moments.values()]
        about = (norm, scale, list(own.moments), shapes)
    norm, scale, names, shapes = group.gather(about)[source]
    if own is None:
        weights, *moments = (
            {key: torch.empty(made[0], dtype=made[1]) for key, made in part.items()} for part in shapes
        )
        own = TrainState(weights, dict(zip(names, moments, strict=True)))
    tensors = [*own.weights.values(), *(value for held in own.moments.values() for value in held.values())]
    group.broadcast(tensors, source)
    return norm, scale, own


def _shape(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype
