"""The number format of the forward and backward pass; trained weights and optimizer state stay fp32."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from clusters.capability import DeviceCapability
from strategies.contract import Dtype

if TYPE_CHECKING:
    import torch


def choose_dtype(device: DeviceCapability) -> tuple[Dtype, str]:
    """The fastest safe precision of a device, and why."""
    if device.kind == "cuda":
        if device.has_fast_bf16:
            return "bfloat16", f"{device.name} multiplies bf16 in hardware"
        return "float16", f"{device.name} has fp16 but no bf16 units"
    if device.has_fast_bf16:
        return "bfloat16", f"{device.name} has bf16 instructions ({', '.join(device.instruction_sets)})"
    return "float32", f"{device.name} has no bf16 instructions: bf16 would be slower than fp32"


def autocast(device_type: str, dtype: Dtype) -> contextlib.AbstractContextManager[Any]:
    """Compute in `dtype` inside the block; fp32 needs no block."""
    import torch

    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=getattr(torch, dtype))


def gradient_scaler(device_type: str, dtype: Dtype) -> torch.amp.GradScaler:
    """Loss scaling, which fp16 needs (Micikevicius et al., arXiv 1710.03740); a pass-through for the others."""
    import torch

    return torch.amp.GradScaler(device_type, enabled=dtype == "float16")
