"""LoRA: the weights stay frozen, each linear map gets a trained low-rank correction (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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

_INIT = Literal["gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal"]


def _knob(default: Any, doc: str, **limits: Any) -> Any:
    """A dataclass field with the sentence and the limits that the job file's schema shows."""
    metadata = {"doc": doc, **limits}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Lora:
    """y = W x + (alpha / r) B A x with W frozen, A (r, in) and B (out, r) trained; B starts at zero.

    The knobs carry PEFT's meaning.  Memory: the frozen weights in the compute precision, 16 bytes a trained parameter.
    """

    lora_r: int = _knob(16, "rank of the correction", ge=1)
    lora_alpha: float = _knob(32, "scale: the correction is multiplied by lora_alpha / lora_r", gt=0)
    lora_dropout: float = _knob(0.0, "dropout on the adapter's input", ge=0, lt=1)
    lora_target_modules: str | list[str] = _knob(
        "all-linear", "which linear maps: all-linear, a regex, or module names"
    )
    layers_to_transform: list[int] | None = _knob(
        None, "only these decoder layers (0 = first); below them nothing trains"
    )
    modules_to_save: list[str] | None = _knob(None, "modules trained in full beside the adapters")
    bias: Literal["none", "all", "lora_only"] = _knob("none", "which biases train")
    use_dora: bool = _knob(False, "DoRA: train magnitude and direction apart (arXiv 2402.09353)")
    use_rslora: bool = _knob(False, "rsLoRA: scale by alpha / sqrt(r) (arXiv 2312.03732)")
    init_lora_weights: bool | _INIT | str = _knob(
        True, "how A and B start: true, gaussian, pissa, pissa_niter_4, olora, ..."
    )
    loraplus_lr_ratio: float | None = _knob(None, "LoRA+: learning rate of B over that of A (arXiv 2402.12354)", gt=0)

    def estimate(self, workload: Workload, device: DeviceCapability, techniques: Techniques) -> StrategyPlan:
        shape, element_bytes = workload.shape, BYTES_PER_ELEMENT[techniques.dtype]
        per_layer = sum(self.lora_r * (i + o) for i, o in shape.linear_shapes)
        num_layers = shape.num_layers if self.layers_to_transform is None else len(self.layers_to_transform)
        num_trainable = num_layers * per_layer
        kept_inputs = element_bytes * (2 * shape.hidden_size + shape.intermediate_size)
        kept_inputs += element_bytes * self.lora_r * len(shape.linear_shapes)
        supervised_fraction = workload.num_supervised_tokens / workload.num_tokens
        forward = forward_flops_per_token(shape, workload.mean_length, supervised_fraction)
        adapters = 2.0 * num_trainable
        memory = MemoryEstimate(
            weights_bytes=element_bytes * shape.num_parameters + 4.0 * num_trainable,
            gradients_bytes=4.0 * num_trainable,
            optimizer_bytes=8.0 * num_trainable,
            activations_bytes=activation_bytes(shape, techniques, kept_inputs) * num_layers / shape.num_layers,
            logits_bytes=logits_bytes(shape, techniques.micro_batch_tokens * supervised_fraction),
        )
        base = forward + forward * (num_layers / shape.num_layers) * (1 + techniques.gradient_checkpointing)
        return StrategyPlan(
            method="lora",
            techniques=techniques,
            memory=memory,
            num_trainable_parameters=num_trainable,
            flops_per_token=base + training_flops_per_token(adapters, True, techniques.gradient_checkpointing),
            checkpoint_bytes=12.0 * num_trainable,
        )

    def load_dtype(self, techniques: Techniques) -> Dtype:
        return techniques.dtype  # frozen weights need no master copy

    def setup(self, model: Any, settings: TrainSettings) -> TrainSetup:
        import torch
        from peft import LoraConfig, get_peft_model

        from strategies.optimizer import build_optimizer

        model.requires_grad_(False)
        config = LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]  # PEFT computes with it; a float is as good
            lora_dropout=self.lora_dropout,
            target_modules=self._targets(model),
            layers_to_transform=self.layers_to_transform,
            modules_to_save=self.modules_to_save,
            bias=self.bias,
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            init_lora_weights=self.init_lora_weights,  # type: ignore[arg-type]
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(settings.seed)  # A is random: every worker must draw the same
        peft_model = get_peft_model(model, config)
        parameters = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
        fast = [p for name, p in parameters.items() if "lora_B" in name]
        slow = [p for name, p in parameters.items() if "lora_B" not in name]
        ratio = self.loraplus_lr_ratio or 1.0
        optimizer = build_optimizer([{"params": slow}, {"params": fast, "lr_factor": ratio}], settings)

        def export(folder: Path) -> None:
            # Asked to decide by itself, PEFT looks the base model up on the hub.
            peft_model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)

        return TrainSetup(peft_model, optimizer, parameters, export, export_name="adapter")

    def _targets(self, model: Any) -> str | list[str]:
        """The targets in a form that PEFT accepts together with a choice of layers: names instead of `all-linear`."""
        if self.layers_to_transform is None or self.lora_target_modules != "all-linear":
            return self.lora_target_modules
        import torch

        output = model.get_output_embeddings()
        linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not output]
        return sorted({name.rsplit(".", 1)[-1] for name in linear})
