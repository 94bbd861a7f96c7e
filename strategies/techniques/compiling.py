"""torch.compile: element-wise operations fused, fewer kernels started."""

from clusters.capability import DeviceCapability
from strategies.shape import ModelShape
from strategies.techniques.technique import Technique


def refuse_compiler(device: DeviceCapability, shape: ModelShape) -> str | None:
    if device.kind == "cuda" and device.compute_capability and device.compute_capability < (7, 0):
        return f"Triton needs compute capability 7.0, {device.name} has {device.compute_capability}"
    return None


TORCH_COMPILE = Technique(
    name="torch.compile",
    about="fuses element-wise work; the first steps wait a minute or more for the compiler",
    switch="train.torch_compile: true",
    on=lambda choice: choice.with_(torch_compile=True, packing=False, attn_implementation="sdpa"),
    off=lambda choice: choice.with_(torch_compile=False, packing=False, attn_implementation="sdpa"),
    impossible=refuse_compiler,
    quality="the same up to rounding",
)
