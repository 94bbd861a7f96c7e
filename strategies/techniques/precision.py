"""The number format of the forward and backward pass; trained weights and optimizer state stay fp32."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from clusters.capability import DeviceCapability
from strategies.contract import Dtype
from strategies.shape import ModelShape
from strategies.techniques.technique import Technique

if TYPE_CHECKING:
    import torch


def refuse_bf16(device: DeviceCapability, shape: ModelShape) -> str | None:
    if device.kind != "cpu" and device.has_bf16_units is False:
        return f"{device.name} has no bf16 units: emulated, slower than fp32"
    return None


BF16 = Technique(
    name="bf16",
    about="forward and backward in bfloat16; trained weights and optimizer stay fp32",
    switch="model.dtype: bfloat16",
    on=lambda choice: choice.with_(dtype="bfloat16"),
    off=lambda choice: choice.with_(dtype="float32"),
    impossible=refuse_bf16,
    quality="rounding of 8 bits; the same loss within noise",
)
FP16 = Technique(
    name="fp16",
    about="forward and backward in float16 with loss scaling",
    switch="model.dtype: float16",
    on=lambda choice: choice.with_(dtype="float16"),
    off=lambda choice: choice.with_(dtype="float32"),
    quality="small numbers can vanish: the loss is scaled against it",
)


def autocast(device_type: str, dtype: Dtype) -> contextlib.AbstractContextManager[Any]:
    """Compute in `dtype` inside the block; fp32 needs no block."""
    import torch

    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=getattr(torch, dtype))


def train_in_fp32(model: torch.nn.Module) -> None:
    """Give whatever trains fp32 weights: in 16 bits small updates would be lost, and loss scaling refuses fp16's."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def gradient_scaler(device_type: str, dtype: Dtype) -> torch.amp.GradScaler:
    """Loss scaling, which fp16 needs (Micikevicius et al., arXiv 1710.03740); a pass-through for the others."""
    import torch

    return torch.amp.GradScaler(device_type, enabled=dtype == "float16")
