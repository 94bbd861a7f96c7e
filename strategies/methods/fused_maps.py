"""Whether LoRA's maps are one function each with their corrections (`strategies/techniques/lora_algebra.py`)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from clusters.capability import DeviceCapability
from strategies.contract import StrategyPlan
from strategies.shape import ModelShape
from strategies.workload import Techniques

if TYPE_CHECKING:
    from strategies.methods.lora import Lora

# Of a map with its correction, apart and fused: elements read and written beside the products for each of its inputs
# and outputs, and kernels started in a forward pass.  Fitted on whole steps of LOG.md's "LoRA's own cost".
BYTES = {False: 2.0, True: 1.0}
OPERATIONS = {False: 7, True: 5}
WORTH = 1.03  # times shorter steps: for less PEFT's layers compute


def why_not_fused(method: Lora, techniques: Techniques, shape: ModelShape) -> str | None:
    """Why these options, this model or these techniques leave the maps to PEFT's layers; None where they need not."""
    reasons = {
        "lora_dropout drops inputs of the correction that the map keeps": method.has_dropout,
        "use_dora scales the sum of map and correction": method.use_dora,
        f"bias: {method.bias} trains biases of the maps": method.bias != "none",
        f"{method.name} multiplies weights in few bits by bitsandbytes' own functions": method.is_quantised,
        "the linear maps of this model are Conv1D": shape.model_type == "gpt2",
        "it is untested under torch.compile": techniques.torch_compile,
        "it is untested under DeepSpeed": techniques.uses_engine,
        "it is untested with streamed weights": techniques.streams_weights,
        "it is untested on stages": techniques.stage is not None,
    }
    why = next((reason for reason, holds in reasons.items() if holds), None)
    return f"method.fused: {why}: set it to auto or false" if why else None


def better_of(plain: StrategyPlan, fused: StrategyPlan, why_not: str | None, device: DeviceCapability) -> StrategyPlan:
    """The fused plan where nothing speaks against it and steps become clearly shorter; with the reason."""
    times = plain.time.step_s / fused.time.step_s
    if why_not is None and device.kind != "cpu":
        why_not = "on a GPU it is not measured"
    if why_not is None and times < WORTH:
        why_not = f"steps would be {times:.2f} times as fast: less than {WORTH} is not worth it"
    if why_not:
        return replace(plain, resolved={"fused": (False, why_not)})
    return replace(fused, resolved={"fused": (True, f"steps are predicted {times:.2f} times as fast")})
