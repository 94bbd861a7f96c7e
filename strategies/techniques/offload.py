"""Keeping in the host's memory what a GPU has no room for (Ren et al., arXiv 2101.06840)."""

from __future__ import annotations

from collections.abc import Callable

from clusters.capability import DeviceCapability
from strategies.contract import Offload
from strategies.shape import ModelShape
from strategies.techniques.libraries import lacks
from strategies.techniques.technique import Choice, Technique


def refuse_offload(device: DeviceCapability, shape: ModelShape) -> str | None:
    return "the device's memory is the host's already" if device.kind == "cpu" else None


def refuse_deepspeed_offload(device: DeviceCapability, shape: ModelShape) -> str | None:
    """Optimizer and weights wait on the host in DeepSpeed's care."""
    return refuse_offload(device, shape) or lacks(device, "deepspeed")


def _to(what: Offload) -> Callable[[Choice], Choice]:
    return lambda choice: choice.with_(offload=what)


def _technique(what: Offload, about: str) -> Technique:
    return Technique(
        name=f"{'parameter' if what == 'parameters' else what.rstrip('s')} offload",
        about=about,
        switch=f"strategy.offload: {what}",
        on=_to(what),
        off=_to("none"),
        impossible=refuse_offload if what == "activations" else refuse_deepspeed_offload,
        saves_first="memory",
    )


OPTIMIZER_OFFLOAD = _technique("optimizer", "the optimizer's state and step on the host's CPU")
PARAMETER_OFFLOAD = _technique("parameters", "the weights too: each layer crosses the bus when it is needed")
ACTIVATION_OFFLOAD = _technique("activations", "saved activations wait in host memory for the backward pass")
