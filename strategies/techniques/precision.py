"""The number format of the forward and backward pass; trained weights and optimizer state stay fp32."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from strategies.workload import Dtype

if TYPE_CHECKING:
    import torch


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


def keep_input_dtype(model: torch.nn.Module) -> None:
    """Let LoRA's layers take their input as it is where autocast computes in 16 bits anyway: to the same bits.

    PEFT casts it to the adapter's fp32, autocast casts that back: two copies, and as many of the gradient.  Layers
    with dropout or DoRA keep the casts, since they compute with the input itself.
    """
    from peft.tuners.lora.layer import Linear

    for layer in model.modules():
        if type(layer) is Linear and not layer.lora_variant and not draws(layer):
            layer._cast_input_dtype = _cast_outside_autocast  # type: ignore[method-assign]


def keeps_input_dtype(layer: Any) -> bool:
    """Whether a PEFT layer was made to by `keep_input_dtype`."""
    return vars(layer).get("_cast_input_dtype") is _cast_outside_autocast


def draws(layer: Any) -> bool:
    """Whether a PEFT layer of LoRA's drops inputs at random."""
    return any(getattr(dropout, "p", 0) > 0 for dropout in layer.lora_dropout.values())


def _cast_outside_autocast(x: Any, dtype: torch.dtype) -> Any:
    import torch

    return x if x is None or torch.is_autocast_enabled(x.device.type) else x.to(dtype)


def gradient_scaler(device_type: str, dtype: Dtype) -> torch.amp.GradScaler:
    """Loss scaling, which fp16 needs (Micikevicius et al., arXiv 1710.03740); a pass-through for the others."""
    import torch

    return torch.amp.GradScaler(device_type, enabled=dtype == "float16")
