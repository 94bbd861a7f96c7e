"""Which techniques and methods may stand together, and on what.  Each rule says why."""

from __future__ import annotations

from clusters.capability import DeviceCapability
from strategies.contract import Method, Techniques
from strategies.methods.as_techniques import no_bitsandbytes
from strategies.model.architecture import Architecture
from strategies.shape import ModelShape
from strategies.techniques import attention
from strategies.techniques.compiling import no_compiler
from strategies.techniques.libraries import lacks
from strategies.techniques.loss import caps_logits
from strategies.techniques.offload import on_the_host
from strategies.techniques.precision import no_bf16


def conflict(
    method: Method, techniques: Techniques, device: DeviceCapability, shape: ModelShape, num_devices: int = 1
) -> str | None:
    """Why this combination cannot be on this device; None where it can."""
    t = techniques
    is_quantised = hasattr(method, "bnb_quant_type")
    refused = attention.refuses(t.attn_implementation, device, shape)
    own = method.refuses(t, shape) if hasattr(method, "refuses") else None  # type: ignore[attr-defined]
    rules = (
        (own is not None, own or ""),
        (refused is not None, f"{t.attn_implementation} attention: {refused}"),
        (
            t.attn_implementation == "document" and not t.packing,
            "document attention is for packed rows: set data.packing: true",
        ),
        (
            t.attn_implementation == "flash_attention_2" and t.dtype == "float32",
            "flash-attn 2 computes in 16 bits only: set model.dtype to bfloat16 or float16",
        ),
        (t.dtype == "bfloat16" and no_bf16(device, shape) is not None, no_bf16(device, shape) or ""),
        (
            (is_quantised or t.optim.startswith("adamw_bnb")) and no_bitsandbytes(device, shape) is not None,
            no_bitsandbytes(device, shape) or "",
        ),
        (t.offload != "none" and on_the_host(device, shape) is not None, on_the_host(device, shape) or ""),
        (t.uses_engine and lacks(device, "deepspeed") is not None, lacks(device, "deepspeed") or ""),
        (is_quantised and shape.num_experts > 0, "experts are stacked tensors, which bitsandbytes does not quantise"),
        (t.zero_stage > 0 and num_devices < 2, "ZeRO divides work among devices, and here is one"),
        (
            t.zero_stage > 0 and t.optim == "adafactor",
            "Adafactor looks at whole matrices, which ZeRO cuts: set train.optim to adamw_torch_fused",
        ),
        (
            t.uses_engine and t.dtype == "float16",
            "DeepSpeed's stages were not run in fp16: set model.dtype to bfloat16 or strategy.mode to zero1",
        ),
        (
            t.uses_engine and t.torch_compile,
            "DeepSpeed's hooks break torch.compile's graph: set train.torch_compile: false",
        ),
        (
            t.uses_engine and t.zero_stage >= 3 and t.loss_type == "chunked_nll",
            "ZeRO-3 holds the output matrix inside the forward pass only: set train.loss_type: nll",
        ),
        (
            t.offload in ("optimizer", "parameters") and num_devices > 1 and t.zero_stage < 2,
            "over several devices offload goes with ZeRO-2 or 3",
        ),
        (t.zero_stage >= 3 and is_quantised, "DeepSpeed's ZeRO-3 does not shard bitsandbytes' 4- and 8-bit weights"),
        (t.offload == "parameters" and is_quantised, "bitsandbytes' weights cannot be fetched layer by layer"),
        (t.uses_engine and is_quantised, "quantised weights were not run under DeepSpeed: set strategy.mode to zero1"),
        (
            t.zero_stage > 0 and t.optim.startswith("adamw_bnb"),
            "8-bit states do not divide into ZeRO's equal parts: their blocks would be cut",
        ),
        (
            t.offload in ("optimizer", "parameters") and t.optim.startswith("adamw_bnb"),
            "an offloaded optimizer runs on the CPU in fp32",
        ),
        (
            t.offload == "parameters" and t.zero_stage not in (0, 3),
            "parameter offload goes with ZeRO-3 or one device",
        ),
        (
            t.offload == "activations" and t.gradient_checkpointing,
            "offloading activations and computing them again save the same bytes: choose one",
        ),
        (
            t.torch_compile and t.attn_implementation == "document",
            "torch.compile would compile anew for every set of document lengths: set data.packing: false",
        ),
        (t.torch_compile and no_compiler(device, shape) is not None, no_compiler(device, shape) or ""),
        (
            t.loss_type == "chunked_nll" and caps_logits(device, shape) is not None,
            f"chunked loss: {caps_logits(device, shape)}",
        ),
    )
    return next((reason for holds, reason in rules if holds), None)


def misfits(method: Method, architecture: Architecture) -> list[str]:
    """Which of a method's knobs name modules or layers that the model does not have; empty where all fit."""
    check = getattr(method, "misfits", None)
    return check(architecture) if check else []


def refuses_local_steps(method: Method) -> str | None:
    """Why workers that train apart cannot use a method; None where they can."""
    if hasattr(method, "subspace_size"):  # it streams
        return "local steps average weights, and this method moves them in its own time: set strategy.local_steps: null"
    return None
