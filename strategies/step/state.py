"""A training's state: gathered for a checkpoint, put back from one, whichever worker keeps which part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from strategies.train_setup import TrainSetup, TrainState

COUNTS = "counts"  # of a weight's state: numbers that its optimizer counts on the host


def gather(setup: TrainSetup) -> TrainState | None:
    """Trained weights and optimizer state, whole, on the CPU; None on workers whose part another one gathers.

    What lies there already is not copied: the next step changes it.
    """
    _settle(setup)
    return setup.sharding.gather() if setup.sharding else gather_own(setup)


def gather_own(setup: TrainSetup) -> TrainState:
    """What this worker itself holds."""
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
    else:
        restore_own(setup, state)


def restore_own(setup: TrainSetup, state: TrainState) -> None:
    """Put back what this worker itself holds, of a whole state."""
    with torch.no_grad():
        for name, held in _held(setup).items():
            held.copy_(state.weights[name])
    home = setup.streaming.home if setup.streaming else homes(setup.optimizer)
    for name, parameter in setup.parameters.items():
        if held := state.moments.get(name):
            setup.optimizer.state[parameter] = {
                key: as_kept(value, home(parameter, key)) for key, value in held.items()
            }


def homes(optimizer: torch.optim.Optimizer) -> Callable[[torch.nn.Parameter, str], torch.device]:
    """Where an optimizer's own step keeps each part of a weight's state.

    Steps are counted on the host unless the update's kernel reads the number itself (`fused`, `capturable`); a fused
    one refuses a number on the host, and the others wait for the device at every weight to read one from there.
    """
    groups = [group for group in optimizer.param_groups if group.get("fused") or group.get("capturable")]
    on_device = {parameter for group in groups for parameter in group["params"]}
    host = torch.device("cpu")

    def home(parameter: torch.nn.Parameter, key: str) -> torch.device:
        return host if key == COUNTS or (key == "step" and parameter not in on_device) else parameter.device

    return home


def as_kept(value: torch.Tensor, home: torch.device) -> torch.Tensor | int:
    """What an optimizer keeps for a gathered value: bitsandbytes counts steps in Python, torch in fp32 tensors."""
    return int(value) if value.dtype == torch.int64 and not value.dim() else value.to(home)


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


def save_model(model: Any, folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write a model as transformers reads it; `weights` stand in where no worker holds them whole."""
    model.save_pretrained(folder, safe_serialization=True, state_dict=dict(weights) if weights else None)


def save_adapter(model: Any, folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write a PEFT model's adapter as PEFT reads it; `weights` as in `save_model`.

    Asked to decide by itself whether embeddings belong to it, PEFT looks the base model up on the hub.
    """
    model.save_pretrained(
        str(folder),
        safe_serialization=True,
        save_embedding_layers=False,
        state_dict=dict(weights) if weights else None,
    )


def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu").contiguous()
