"""Keeping in the host's memory what a GPU has no room for (Ren et al., arXiv 2101.06840)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from clusters.capability import DeviceCapability
from strategies.contract import Offload
from strategies.shape import ModelShape
from strategies.techniques.libraries import lacks
from strategies.techniques.technique import Choice, Technique

if TYPE_CHECKING:
    import torch


def on_the_host(device: DeviceCapability, shape: ModelShape) -> str | None:
    return "the device's memory is the host's already" if device.kind == "cpu" else None


def by_deepspeed(device: DeviceCapability, shape: ModelShape) -> str | None:
    """Optimizer and weights wait on the host in DeepSpeed's care."""
    return on_the_host(device, shape) or lacks(device, "deepspeed")


def saved_on_host(offload: Offload, model: torch.nn.Module, device: torch.device) -> AbstractContextManager[Any]:
    """Keep what the backward pass needs in pinned host memory inside the block (`activations` on a GPU)."""
    if offload != "activations" or device.type == "cpu":
        return contextlib.nullcontext()
    from strategies.step.activations_on_host import activations_on_host

    return activations_on_host(model.parameters(), device)


def _to(what: Offload) -> Callable[[Choice], Choice]:
    return lambda choice: choice.with_(offload=what)


def _room(what: Offload, about: str) -> Technique:
    return Technique(
        name=f"{'parameter' if what == 'parameters' else what.rstrip('s')} offload",
        about=about,
        switch=f"strategy.offload: {what}",
        on=_to(what),
        off=_to("none"),
        impossible=on_the_host if what == "activations" else by_deepspeed,
        saves_first="memory",
    )


OPTIMIZER_OFFLOAD = _room("optimizer", "the optimizer's state and step on the host's CPU")
PARAMETER_OFFLOAD = _room("parameters", "the weights too: each layer crosses the bus when it is needed")
ACTIVATION_OFFLOAD = _room("activations", "saved activations wait in host memory for the backward pass")
