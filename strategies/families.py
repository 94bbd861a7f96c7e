"""What the layers of each known model_type consist of: a new family is one entry in families.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Family:
    """What the layers of one model_type consist of.

    `attention` and `mlp` name the linear maps; `qkv` and `gate_up` there are fused ones.  `norms` counts those of
    width hidden_size in a layer, `qk_norm` those of queries and keys.
    """

    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    norms: int = 2
    norm_bias: bool = False  # LayerNorm with bias; without it RMSNorm
    qkv_bias: bool | str = False  # a string names the config's key
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: str = ""  # "head": width head_dim; "full": over all heads
    positions: int | None = None  # learned position embeddings: how many more than the config says
    tied: bool = True  # when config.json is silent
    head_bias: bool = False
    final_norm: bool = True
    parallel: bool = False  # attention and MLP read one normed input
    encoder: bool = False
    experts: bool = False  # its MLPs are experts, all or most of them
    shared_expert: str = ""  # where the expert that every token goes through lies
    layers: str = "model.layers"
    attention_at: str = "self_attn"
    mlp_at: str = "mlp"
    embedding: str = "model.embed_tokens"
    output: str = "lm_head"


def _read(file: Path) -> dict[str, Family]:
    listed = tomllib.loads(file.read_text(encoding="utf-8"))

    def keys_of(name: str) -> dict[str, Any]:
        own: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in listed[name].items()}
        return keys_of(own.pop("like")) | own if "like" in own else own

    return {name: Family(**keys_of(name)) for name in listed}


FAMILIES: dict[str, Family] = _read(Path(__file__).with_suffix(".toml"))
