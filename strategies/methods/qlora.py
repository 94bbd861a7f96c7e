"""QLoRA: LoRA over a base kept in 4 or 8 bits (Dettmers et al., arXiv 2305.14314 and 2208.07339)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from strategies.contract import option
from strategies.cost.plan import Costs
from strategies.methods.lora import Lora
from strategies.model import targets
from strategies.model.architecture import Architecture
from strategies.quality import QualityPrior
from strategies.shape import ModelShape
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import BYTES_PER_ELEMENT, Quantization, Techniques

# Bytes of one quantised weight: half a byte and an fp32 scale a block of 64; with double quantisation the scales take
# 8 bits and an fp32 scale a block of 256 of them.  int8: one byte, an fp32 scale a row is too little to count.
_BYTES = {("nf4", False): 0.5 + 4 / 64, ("nf4", True): 0.5 + 1 / 64 + 4 / (64 * 256), ("int8", False): 1.0}


@dataclass(frozen=True)
class QLora(Lora):
    """LoRA over a frozen base in 4 bits (nf4) or 8 (int8), expanded to the compute precision weight by weight.

    Embeddings, norms and the output matrix stay in the compute precision.
    """

    bnb_quant_type: Quantization = option("nf4", "nf4 = 4 bits, int8 = 8 bits with outliers apart")
    bnb_4bit_use_double_quant: bool = option(True, "quantise the scales too: saves 0.05 bytes a weight")

    name: ClassVar[str] = "qlora"
    is_quantised: ClassVar[bool] = True

    def find_misfits(self, architecture: Architecture) -> list[str]:
        quantised = {name for name in architecture.linear_maps if architecture.layer_of(name) is not None}
        return super().find_misfits(architecture) + [
            f"method.modules_to_save: {name!r} is kept in few bits, which cannot be trained: only modules outside the"
            " layers can, such as lm_head and embed_tokens"
            for name in self.modules_to_save or ()
            if any(targets.is_saved(module, name) for module in quantised)
        ]

    def why_alone(self) -> str | None:
        if self.bnb_quant_type == "int8":  # LLM.int8: a column is an outlier where any token of the row makes it one
            return "int8 looks for outliers over all tokens of a row, so that jobs of one row would reach each other"
        return super().why_alone()

    def costs(self, shape: ModelShape, techniques: Techniques) -> Costs:
        costs = super().costs(shape, techniques)
        g = BYTES_PER_ELEMENT[techniques.dtype]
        every = targets.adapted_maps(shape, targets.AdapterChoice())
        quantised = every.elements
        saved = quantised * (g - self._bytes)
        footprint = replace(
            costs.footprint,
            weights_bytes=costs.footprint.weights_bytes - saved,
            dequantised_bytes=costs.footprint.dequantised_bytes + g * every.largest,
        )
        # A pass reads the codes and writes the expanded weight, which the product reads again.
        work = replace(
            costs.work,
            dequantised_parameters=quantised,
            dequantise_bytes_per_parameter=self._bytes + 2 * g,
            dequantise_operations=len(shape.linears) * (2 if self.bnb_4bit_use_double_quant else 1),
        )
        return Costs(footprint, work)

    @property
    def _bytes(self) -> float:
        return _BYTES[self.bnb_quant_type, self.bnb_4bit_use_double_quant and self.bnb_quant_type == "nf4"]

    def quality_prior(self) -> QualityPrior:
        source = "no 4-bit run in PEFT's MetaMathQA suite; QLoRA's paper finds it equal to 16 bits within its noise"
        return QualityPrior(0.470, 0.02, f"{source}, so LoRA's with a wider margin")

    def load_arguments(self, techniques: Techniques) -> dict[str, Any]:
        import torch
        from transformers import BitsAndBytesConfig

        if self.bnb_quant_type == "int8":
            return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=getattr(torch, techniques.dtype),
        )
        return {"quantization_config": config}

    def setup(self, model: Any, settings: TrainSettings) -> TrainSetup:
        from strategies.step.quantise import keep_layout

        if not getattr(model, "is_quantized", False):
            raise ValueError(
                "the model was loaded without quantisation; pass load_arguments() to the loader, and use a model"
                " whose linear maps bitsandbytes knows"
            )
        keep_layout(model)
        return super().setup(model, settings)
