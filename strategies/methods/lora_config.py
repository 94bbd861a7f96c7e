"""LoRA's options as PEFT's configuration."""

from __future__ import annotations

from typing import Any

from strategies.model import targets
from strategies.model.architecture import architecture_of


def build_lora_config(lora: Any, model: Any) -> Any:
    """PEFT's configuration of a `Lora`'s options for this model."""
    from peft import LoraConfig

    from strategies.model.heads import has_score

    start = True if lora.init_lora_weights == "eva" else lora.init_lora_weights  # `EvaStart` gives A its directions
    is_transposed = any(type(module).__name__ == "Conv1D" for module in model.modules())  # GPT-2's linear maps
    return LoraConfig(
        fan_in_fan_out=is_transposed,
        r=lora.lora_r,
        lora_alpha=whole_if_possible(lora.lora_alpha),  # type: ignore[arg-type]  # PEFT computes with any number
        lora_dropout=lora.lora_dropout,
        target_modules=_targets(lora, model),
        layers_to_transform=lora.layers_to_transform,
        modules_to_save=list(lora.modules_to_save) if lora.modules_to_save else None,  # PEFT adds the score to it
        trainable_token_indices=lora.trainable_token_indices,
        target_parameters=lora.target_parameters,
        bias=lora.bias,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        init_lora_weights=start,  # type: ignore[arg-type]
        task_type="SEQ_CLS" if has_score(model) else "CAUSAL_LM",
    )


def _targets(lora: Any, model: Any) -> str | list[str]:
    """The targets in a form that PEFT accepts together with a choice of layers: names, no expression."""
    if lora.layers_to_transform is None or isinstance(lora.lora_target_modules, list):
        return lora.lora_target_modules
    built = architecture_of(model)
    if lora.lora_target_modules == targets.ALL:
        return sorted(built.last_names(built.linear_maps))
    found = targets.resolve_targets(lora.lora_target_modules, tuple(built.modules), built.linear_maps)
    return [name for name in found if built.layer_of(name) in lora.layers_to_transform]


def whole_if_possible(value: float) -> float:
    """32 for 32.0: other readers of adapter_config.json, e.g. Ollama's, take whole numbers alone."""
    return int(value) if float(value).is_integer() else value
