"""What a device, its libraries or the model's layers rule out: each refusal gives the reason, None where it runs."""

from __future__ import annotations

from clusters.capability import DeviceCapability
from strategies.shape import ModelShape
from strategies.techniques.attention import refuse_kernel
from strategies.techniques.libraries import lacks


def refuse_bf16(device: DeviceCapability, shape: ModelShape) -> str | None:
    if device.kind != "cpu" and device.has_bf16_units is False:
        return f"{device.name} has no bf16 units: emulated, slower than fp32"
    return None


def refuse_bitsandbytes(device: DeviceCapability, shape: ModelShape) -> str | None:
    """Quantised weights and optimizer states need a library that runs on this device: first what rules it out there."""
    if device.kind == "cuda" and device.compute_capability is not None and device.compute_capability < (6, 0):
        return f"bitsandbytes needs compute capability 6.0, {device.name} has {device.compute_capability}"
    if (reason := lacks(device, "bitsandbytes")) is not None:
        return reason
    if device.kind == "rocm" and "bitsandbytes" not in device.libraries:
        return "bitsandbytes is not known to run on this Radeon; measure it there"
    return None


def refuse_chunked_loss(device: DeviceCapability, shape: ModelShape) -> str | None:
    return "the model caps its logits after the output matrix" if shape.softcap else None


def refuse_compiler(device: DeviceCapability, shape: ModelShape) -> str | None:
    if device.kind == "cuda" and device.compute_capability and device.compute_capability < (7, 0):
        return f"Triton needs compute capability 7.0, {device.name} has {device.compute_capability}"
    return None


# Families of which Liger 0.8 replaces every norm and MLP of a layer (its MODEL_TYPE_TO_APPLY_LIGER_FN has more).
LIGER_FAMILIES = (
    *("gemma", "gemma2", "gemma3_text", "glm4", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"),
    "smollm3",
)


def refuse_liger(device: DeviceCapability, shape: ModelShape) -> str | None:
    """Liger's kernels are Triton's, for NVIDIA's GPUs and some families."""
    if device.kind != "cuda":
        return f"Liger's kernels are for NVIDIA's GPUs, and {device.name} is none"
    if reason := refuse_compiler(device, shape):
        return reason
    if shape.model_type not in LIGER_FAMILIES:
        return f"Liger's kernels are not tried for {shape.model_type} models; they are for {', '.join(LIGER_FAMILIES)}"
    return lacks(device, "liger_kernel")


def refuse_sharing(device: DeviceCapability, shape: ModelShape) -> str | None:
    """Why rows that begin alike are computed one by one."""
    if refusal := refuse_kernel("document", device, shape):
        return f"document attention: {refusal}"
    if shape.dropout or shape.attention_dropout:
        return "the model has dropout: a shared token would have one mask for several rows"
    if shape.num_experts:
        return "untested with experts, which see all tokens of a micro-batch at once"
    if device.kind != "cpu":
        return "on a GPU it is neither tested nor measured"
    return None


def refuse_offload(device: DeviceCapability, shape: ModelShape) -> str | None:
    return "the device's memory is the host's already" if device.kind == "cpu" else None
