"""Whether LoRA's maps are one function each with their corrections (`strategies/techniques/lora_algebra.py`)."""

from __future__ import annotations

from typing import Any

from strategies.shape import ModelShape
from strategies.workload import Techniques

# Of a map with its correction, apart and fused: bytes read and written beside the products for each of its inputs and
# outputs, above an element's own, and kernels started in a forward pass (LOG.md, "LoRA's own cost").
MORE_BYTES = {False: 4.0, True: 0.0}
OPERATIONS = {False: 7, True: 5}


def why_not_fused(method: Any, techniques: Techniques, shape: ModelShape) -> str | None:
    """Why LoRA's maps stay PEFT's with these options, model and techniques; None where they can be fused."""
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
    return f"method.fused: {why}: set it to false" if why else None
