"""Which kernel computes attention.  `document` is this project's own, in document_attention.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clusters.capability import DeviceCapability, Kind
from strategies.shape import ModelShape
from strategies.techniques.libraries import lacks
from strategies.workload import Dtype, Techniques


def refuse_kernel(kernel: str, device: DeviceCapability, shape: ModelShape) -> str | None:
    """Why a kernel cannot run a model on a device; None where it can."""
    if kernel == "eager":
        return None
    if shape.softcap and kernel != "flex_attention":
        return "the model caps its scores, which this kernel does not compute; eager does"
    if kernel == "document" and shape.model_type == "gptj":
        return "the model's code chooses its kernel itself and does not know this one"
    if kernel == "document" and shape.family.encoder:
        return "the kernel is causal, the model is bidirectional"
    if kernel == "flash_attention_2":
        if device.kind == "cpu":
            return "flash-attn is a GPU library"
        if device.kind == "cuda" and device.compute_capability and device.compute_capability < (8, 0):
            return f"flash-attn 2 needs Ampere or newer, {device.name} has {device.compute_capability}"
        if shape.head_dim > 256:
            return f"flash-attn 2 supports heads up to 256, these have {shape.head_dim}"
        if (reason := lacks(device, "flash_attn")) is not None:
            return reason
        if device.kind == "rocm" and "flash_attn" not in device.libraries:
            return "not known to run on this Radeon; measure it there"
    if kernel == "flex_attention" and device.kind == "cpu":
        return "flex_attention has no backward pass on a CPU"
    if kernel == "flex_attention" and device.compute_capability and device.compute_capability < (7, 0):
        return "flex_attention needs Triton: compute capability 7.0"
    return None


Sharing = Literal["packed", "shared", "expanded"]
_VARLEN_TORCH = (2, 13)  # the first torch whose varlen_attn knows grouped heads, windows and gradients


@dataclass(frozen=True)
class Heads:
    """One layer's attention, as far as it decides which kernel computes it."""

    num_heads: int
    num_key_heads: int
    head_dim: int
    is_windowed: bool = False  # some document is longer than the model's sliding window
    has_dropout: bool = False


def sharing(
    kind: Kind, compute_capability: tuple[int, int] | None, dtype: Dtype, heads: Heads, torch: tuple[int, ...]
) -> Sharing:
    """How causal attention runs on a device under a version of torch.

    `packed`: one varlen kernel for all documents of a row; `shared`: a fused kernel a document whose query heads share
    keys and values; `expanded`: the same with keys and values copied to every query head.  Asked to share where the
    flash kernel does not run (before Ampere, in fp32, for wide heads, under a mask), torch computes in plain products
    that keep every score: 20.2 GiB in place of 1.8 for 2048 tokens of Llama-3-8B.
    """
    flash = kind == "cuda" and _flash_runs(compute_capability, dtype, heads)
    if flash and torch >= _VARLEN_TORCH and heads.head_dim % 8 == 0 and not heads.has_dropout:
        return "packed"
    shares = kind == "cpu" or heads.num_heads == heads.num_key_heads or (flash and not heads.is_windowed)
    return "shared" if shares else "expanded"


def _flash_runs(compute_capability: tuple[int, int] | None, dtype: Dtype, heads: Heads) -> bool:
    """Whether torch's flash kernel computes forward and backward (the checks of ATen's sdp_utils.cpp)."""
    if compute_capability is None or compute_capability < (8, 0) or dtype == "float32" or heads.head_dim > 256:
        return False
    if compute_capability not in ((8, 0), (9, 0), (10, 0)) and heads.head_dim > 192:  # too little shared memory
        return heads.head_dim > 224 and not heads.has_dropout
    return True


def copies_keys(device: DeviceCapability, shape: ModelShape, techniques: Techniques) -> bool:
    """Whether keys and values are copied to every query head, which costs memory."""
    if techniques.attn_implementation not in ("document", "sdpa"):
        return False
    heads = Heads(shape.num_heads, shape.key_value_size // shape.head_dim, shape.head_dim)
    return sharing(device.kind, device.compute_capability, techniques.dtype, heads, _VARLEN_TORCH) == "expanded"
