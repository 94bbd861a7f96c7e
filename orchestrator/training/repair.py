"""An update that ran out of memory on some workers: they take what came of it from one on which it went through.

Workers hold the same weights and the same optimizer state, so nothing of the step is lost; an update that broke off has
moved some weights and not others, and must not be repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from orchestrator.errors import NothingFits
from orchestrator.training.out_of_memory import first_line, is_out_of_memory, release_cache
from orchestrator.training.parallel import Group
from strategies.contract import TrainSetup, TrainState
from strategies.state import gather, restore


def can_repair(setup: TrainSetup, group: Group, apart: bool) -> bool:
    """Whether another worker has the same state, and no worker waits for another inside the update."""
    return group.size > 1 and not (setup.engine or setup.sharding or setup.streaming or apart)


def agree_on_update(
    setup: TrainSetup,
    group: Group,
    lacking: str | None,
    scale: dict[str, Any],
    norm: float,
    note: Callable[[str], None],
) -> tuple[float, dict[str, Any] | None]:
    """Bring workers whose update failed (`lacking` says why) to the state of the first one that has it.

    Collective.  Returns the gradients' norm and, on a worker that was repaired, the state of the loss scale for a new
    scaler.  Raises NothingFits on all workers where none has it, or where it does not fit on one of them even so.
    """
    failed = group.sum([float(lacking is not None and rank == group.rank) for rank in range(group.size)])
    if not any(failed):
        return norm, None
    reasons = {rank: reason for rank, reason in enumerate(group.gather(lacking)) if reason is not None}
    told = "; ".join(f"worker {rank}: {reason}" for rank, reason in reasons.items())
    if all(failed):
        raise _nothing_fits(told)
    source = failed.index(0.0)
    if lacking is not None:
        _forget(setup)
    norm, scale, state = _state_of(setup, group, source, scale, norm)
    again = None
    if lacking is not None:
        try:
            restore(setup, state)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            again = first_line(error)
    if again_told := [reason for reason in group.gather(again) if reason is not None]:
        raise _nothing_fits("; ".join(again_told))
    note(f"out of memory in the update; its result was taken from worker {source} ({told})")
    return norm, scale if lacking is not None else None


def _nothing_fits(told: str) -> NothingFits:
    return NothingFits(
        f"the optimizer's update does not fit: {told}. Choose a train.optim with less state, or strategy.offload:"
        " optimizer"
    )


def _forget(setup: TrainSetup) -> None:
    """Without gradients and optimizer state, of which the update left a part."""
    setup.optimizer.zero_grad(set_to_none=True)
    setup.optimizer.state.clear()
    release_cache()


def _state_of(
    setup: TrainSetup, group: Group, source: int, scale: dict[str, Any], norm: float
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
