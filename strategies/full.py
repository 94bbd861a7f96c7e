"""Full fine-tuning: every weight trains, with fp32 master weights and AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters.capability import DeviceCapability
from strategies.contract import (
    BYTES_PER_ELEMENT,
    Dtype,
    MemoryEstimate,
    StrategyPlan,
    Techniques,
    TrainSettings,
    TrainSetup,
    Workload,
)
from strategies.cost.memory import activation_bytes, logits_bytes
from strategies.cost.time import forward_flops_per_token, training_flops_per_token


@dataclass(frozen=True)
class Full:
    """Train all weights.  Cost: 16 bytes a parameter (fp32 weight, gradient, two Adam moments) and activations."""

    def estimate(self, workload: Workload, device: DeviceCapability, techniques: Techniques) -> StrategyPlan:
        shape = workload.shape
        num_parameters = shape.num_parameters
        kept_inputs = BYTES_PER_ELEMENT[techniques.dtype] * (2 * shape.hidden_size + shape.intermediate_size)
        supervised_fraction = workload.num_supervised_tokens / workload.num_tokens
        forward = forward_flops_per_token(shape, workload.mean_length, supervised_fraction)
        memory = MemoryEstimate(
            weights_bytes=4.0 * num_parameters,
            gradients_bytes=4.0 * num_parameters,
            optimizer_bytes=8.0 * num_parameters,
            activations_bytes=activation_bytes(shape, techniques, kept_inputs),
            logits_bytes=logits_bytes(shape, techniques.micro_batch_tokens * supervised_fraction),
        )
        return StrategyPlan(
            method="full",
            techniques=techniques,
            memory=memory,
            num_trainable_parameters=num_parameters,
            flops_per_token=training_flops_per_token(forward, True, techniques.gradient_checkpointing),
            checkpoint_bytes=12.0 * num_parameters,
        )

    def load_dtype(self, techniques: Techniques) -> Dtype:
        return "float32"  # master weights: autocast computes in the planned precision

    def setup(self, model: Any, settings: TrainSettings) -> TrainSetup:
        from strategies.optimizer import build_optimizer

        model.requires_grad_(True)
        parameters = dict(model.named_parameters())
        optimizer = build_optimizer([{"params": list(parameters.values())}], settings)

        def export(folder: Path) -> None:
            model.save_pretrained(folder, safe_serialization=True)

        return TrainSetup(model, optimizer, parameters, export, export_name="model")
