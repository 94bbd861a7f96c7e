"""A LoRA adapter as GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), which llama.cpp adds to its base.

llama.cpp computes W x + (alpha / r) B (A x) with tensors under its own names.  For the llama architecture it stores
queries and keys with the halves of each head interleaved (ROPE as pairs of neighbours), so B's rows go the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy

from strategies.adapter_bank.adapter import Adapter, Unusable

FILE = "adapter.gguf"
# model_type -> llama.cpp's architecture; every one of them stores a linear map a tensor.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def write(exported: Path, config: Mapping[str, Any], base_name: str, file: Path, whole_alpha: bool = False) -> int:
    """Write the adapter in `exported`, whose base has this config.json; how many linear maps it corrects.

    `whole_alpha`: for readers that take whole numbers alone.  Raises Unusable for a family that was not tried and for
    what is more than pairs of A and B.
    """
    import gguf

    architecture, adapter = architecture_of(config), Adapter(exported)
    alpha, tensors = _alpha(adapter, whole_alpha), dict(_tensors(adapter, config, architecture, whole_alpha))
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base_name)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return len(tensors) // 2


def architecture_of(config: Mapping[str, Any]) -> str:
    """llama.cpp's name.  Raises Unusable for a family whose adapters were not tried."""
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise Unusable(f"adapters of {kind} were not tried with llama.cpp, only of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[kind]


def _alpha(adapter: Adapter, whole: bool) -> float:
    """The one alpha of the file: by rsLoRA's rule times the root of the rank, as llama.cpp divides by the rank."""
    settings = adapter.settings
    alpha = settings.lora_alpha * (math.sqrt(settings.r) if settings.use_rslora else 1)
    return float(max(1, round(alpha))) if whole else float(alpha)


def _tensors(
    adapter: Adapter, config: Mapping[str, Any], architecture: str, whole: bool
) -> Iterator[tuple[str, numpy.ndarray]]:
    """A and B of every map under llama.cpp's names.  Raises Unusable for maps outside the layers."""
    import gguf

    kind = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names, alpha = gguf.get_tensor_name_map(kind, int(config["num_hidden_layers"])), _alpha(adapter, whole)
    for name, target in adapter.targets.items():
        place = names.get_name(name)
        if place is None or not place.startswith("blk."):
            raise Unusable(f"{adapter.folder} corrects {name}, which llama.cpp's adapters of {architecture} do not")
        factors = adapter.factors(name)  # B with its scale in it
        a_RI, b_OR = factors.a_RI.numpy(), factors.b_OR.numpy() * numpy.float32(target.rank / alpha)
        heads = _HEADS.get(name.rpartition(".")[2])
        if heads and architecture == "llama":
            b_OR = _interleave(b_OR, int(config.get(heads) or config["num_attention_heads"]))
        yield f"{place}.weight.lora_a", numpy.ascontiguousarray(a_RI)
        yield f"{place}.weight.lora_b", numpy.ascontiguousarray(b_OR)


def _interleave(rows: numpy.ndarray, num_heads: int) -> numpy.ndarray:
    """Rows of each head, first half and second half in turn."""
    outputs = rows.shape[0]
    halves = rows.reshape(num_heads, 2, outputs // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
