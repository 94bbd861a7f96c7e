"""What a training has come to: gathered for a checkpoint, put back from one, whoever keeps which part of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from strategies.contract import TrainSetup, TrainState


def gather(setup: TrainSetup) -> TrainState | None:
    """Trained weights and optimizer state, whole, on the CPU; None on workers whose part another one gathers.

    What lies there already is not copied: the next step changes it.
    """
    _settle(setup)
    if setup.sharding:
        return setup.sharding.gather()
    moments = {}
    for name, parameter in setup.parameters.items():
        held = setup.optimizer.state.get(parameter, {})
        moments[name] = {key: to_cpu(torch.as_tensor(value)) for key, value in held.items() if value is not None}
    return TrainState({name: to_cpu(held) for name, held in _held(setup).items()}, moments)


def restore(setup: TrainSetup, state: TrainState) -> None:
    """Put a state back; without moments only the weights."""
    _settle(setup)
    if setup.sharding:
        setup.sharding.restore(state)
        return
    with torch.no_grad():
        for name, held in _held(setup).items():
            held.copy_(state.weights[name])
    for name, parameter in setup.parameters.items():
        if held := state.moments.get(name):
            setup.optimizer.state[parameter] = {
                key: value if key == "step" and parameter.device.type == "cpu" else value.to(parameter.device)
                for key, value in held.items()
            }


def _held(setup: TrainSetup) -> dict[str, torch.Tensor]:
    return {**setup.parameters, **setup.buffers}


def forget(setup: TrainSetup) -> None:
    """The optimizer as if it had made no step."""
    _settle(setup)
    if setup.sharding:
        setup.sharding.forget()
    else:
        setup.optimizer.state.clear()


def _settle(setup: TrainSetup) -> None:
    """Nothing may still be moving."""
    if setup.streaming:
        setup.streaming.collect()


def zero(states: Iterable[dict]) -> None:
    """An optimizer's states back to where they began, in place."""
    for state in states:
        for key, value in state.items():
            if torch.is_tensor(value):
                value.zero_()
            elif key == "step":
                state[key] = 0


def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu").contiguous()
