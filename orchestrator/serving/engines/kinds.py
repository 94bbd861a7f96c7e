"""How an adapter is computed beside others, as its adapter_config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from clusters.safe.reading import read_json

Kind = Literal["shared", "in turn", "alone"]
# Options of PEFT's LoRA that a batch of different adapters computes; whatever else is switched on, now or in a later
# version, is given a model of its own.
_MIXED = {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"}
_MIXED |= {"layers_to_transform", "layers_pattern", "use_rslora", "use_dora", "lora_bias", "peft_type", "task_type"}
_MIXED |= {"auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"}
_MIXED |= {"megatron_core", "qalora_group_size", "runtime_config"}  # their defaults are not empty
_UNCHANGED = (True, False, None, "gaussian", "orthogonal")  # init_lora_weights that leave the base as it is


def kind_of_adapter(folder: Path) -> Kind:
    """Of an adapter, or of a whole model.  Raises BadInput where it cannot be read."""
    file = folder / "adapter_config.json"
    settings = read_json(file) if file.is_file() else None
    if not isinstance(settings, Mapping) or settings.get("peft_type") != "LORA":
        return "alone"
    begin, biases = settings.get("init_lora_weights"), settings.get("bias") or "none"
    others = [key for key, value in settings.items() if value and key not in {*_MIXED, "init_lora_weights", "bias"}]
    if others or biases != "none" or begin not in _UNCHANGED:
        return "alone"
    return "in turn" if settings.get("use_dora") else "shared"
