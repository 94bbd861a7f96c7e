"""A LoRA adapter as PEFT writes it, with the shapes of SmolLM-135M: 30 layers, 576 wide, keys and values 192."""

import json
from pathlib import Path

import numpy
from safetensors.numpy import save_file

_CONFIG = {
    "alpha_pattern": {}, "base_model_name_or_path": None, "bias": "none", "fan_in_fan_out": False,
    "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
    "lora_alpha": 32, "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA", "r": 16, "rank_pattern": {},
    "revision": None, "target_modules": ["q_proj", "v_proj"], "task_type": None, "use_dora": False,
    "use_rslora": False,
}  # fmt: skip


def write_adapter(folder: Path, base: str, seed: int = 0, num_layers: int = 30) -> Path:
    """Write random weights of rank 16 for the query and value maps of every layer; the folder."""
    draw = numpy.random.default_rng(seed)
    tensors = {}
    for layer in range(num_layers):
        for name, outputs in (("q_proj", 576), ("v_proj", 192)):
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{place}.lora_A.weight"] = draw.standard_normal((16, 576), numpy.float32) / 50
            tensors[f"{place}.lora_B.weight"] = draw.standard_normal((outputs, 16), numpy.float32) / 50
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({**_CONFIG, "base_model_name_or_path": base}, indent=2))
    return folder
