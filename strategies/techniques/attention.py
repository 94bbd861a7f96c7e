"""Which kernel computes attention.  `document` is this project's own, in document_attention.py."""

from __future__ import annotations

from collections.abc import Callable

from clusters.capability import DeviceCapability
from strategies.shape import ModelShape
from strategies.techniques.libraries import lacks
from strategies.techniques.room import Choice, Technique


def refuses(kernel: str, device: DeviceCapability, shape: ModelShape) -> str | None:
    """Why a kernel cannot run a model on a device; None where it can."""
    if kernel == "eager":
        return None
    if shape.softcap and kernel != "flex_attention":
        return "the model caps its scores, which this kernel does not compute; eager does"
    if kernel == "document" and shape.model_type == "gptj":
        return "the model's code chooses its kernel itself and does not know this one"
    if kernel == "document" and shape.family.encoder:
        return "the kernel is causal, the model looks both ways"
    if kernel == "flash_attention_2":
        if device.kind == "cpu":
            return "flash-attn is a GPU library"
        if (reason := lacks(device, "flash_attn")) is not None:
            return reason
        if device.kind == "cuda" and device.compute_capability and device.compute_capability < (8, 0):
            return f"flash-attn 2 needs Ampere or newer, {device.name} has {device.compute_capability}"
        if device.kind == "rocm" and "flash_attn" not in device.libraries:
            return "not known to run on this Radeon; measure it there"
        if shape.head_dim > 256:
            return f"flash-attn 2 ends at heads of 256, these have {shape.head_dim}"
    if kernel == "flex_attention" and device.kind == "cpu":
        return "flex_attention has no backward pass on a CPU"
    if kernel == "flex_attention" and device.compute_capability and device.compute_capability < (7, 0):
        return "flex_attention needs Triton: compute capability 7.0"
    return None


def _kernel(name: str) -> Callable[[Choice], Choice]:
    return lambda choice: choice.with_(attn_implementation=name, packing=name == "document")


def _room(kernel: str, name: str, about: str, than: str) -> Technique:
    return Technique(
        name=name,
        about=about,
        switch=f"model.attn_implementation: {kernel}",
        on=_kernel(kernel),
        off=_kernel(than),
        impossible=lambda device, shape: refuses(kernel, device, shape),
        quality="the same up to rounding",
    )


EAGER = _room("eager", "eager attention", "plain products that keep every score; what all models have", "sdpa")
SDPA = _room("sdpa", "SDPA attention", "PyTorch's fused kernel", "eager")
FLASH = _room("flash_attention_2", "flash-attn 2", "the flash-attn library's kernels (arXiv 2307.08691)", "sdpa")
FLEX = _room("flex_attention", "flex attention", "a kernel compiled for the mask at hand", "sdpa")
