"""What the layers of each known model_type are made of: a new family is one entry in `FAMILIES`."""

from __future__ import annotations

from dataclasses import dataclass
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
    norm_weight_offset: bool = False  # Gemma's 1 + w: one more tensor a norm
    experts: bool = False  # its MLPs are experts, all or most of them
    shared_expert: str = ""  # where the expert that every token goes through lies
    layers: str = "model.layers"
    attention_at: str = "self_attn"
    mlp_at: str = "mlp"
    embedding: str = "model.embed_tokens"
    output: str = "lm_head"


_LAYER_NORM: dict[str, Any] = {"norm_bias": True, "qkv_bias": True, "output_bias": True, "mlp_bias": True}
_LLAMA: dict[str, Any] = {
    "qkv_bias": "attention_bias",
    "output_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "tied": False,
}
_BERT: dict[str, Any] = {
    "attention": ("query", "key", "value", "dense"),
    "mlp": ("dense", "dense"),
    "positions": 0,
    "final_norm": False,
    "encoder": True,
    "layers": "encoder.layer",
    "attention_at": "attention",
    "embedding": "embeddings.word_embeddings",
    "output": "cls.predictions.decoder",
    **_LAYER_NORM,
}
_GPT: dict[str, Any] = {"layers": "transformer.h", "attention_at": "attn", "embedding": "transformer.wte"}

FAMILIES: dict[str, Family] = {
    "llama": Family(**_LLAMA),
    "mistral": Family(tied=False),
    "mixtral": Family(tied=False, experts=True),
    "smollm3": Family(**{**_LLAMA, "tied": True}),
    "granite": Family(**{**_LLAMA, "tied": True}),
    "qwen2": Family(qkv_bias=True, tied=False),
    "qwen3": Family(qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="head", tied=False),
    "qwen2_moe": Family(qkv_bias="qkv_bias", tied=False, experts=True, shared_expert="mlp.shared_expert"),
    "qwen3_moe": Family(
        qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="head", tied=False, experts=True
    ),
    "olmoe": Family(qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="full", tied=False, experts=True),
    "glm4_moe": Family(
        qkv_bias="attention_bias", qk_norm="head", tied=False, experts=True, shared_expert="mlp.shared_experts"
    ),
    "gemma": Family(qkv_bias="attention_bias", output_bias="attention_bias", norm_weight_offset=True),
    "gemma2": Family(norms=4, qkv_bias="attention_bias", output_bias="attention_bias", norm_weight_offset=True),
    "gemma3_text": Family(
        norms=4, qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="head", norm_weight_offset=True
    ),
    "olmo2": Family(qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="full", tied=False),
    "phi": Family(
        attention=("q_proj", "k_proj", "v_proj", "dense"),
        mlp=("fc1", "fc2"),
        norms=1,
        parallel=True,
        tied=False,
        head_bias=True,
        **_LAYER_NORM,
    ),
    "phi3": Family(attention=("qkv_proj", "o_proj"), mlp=("gate_up_proj", "down_proj"), tied=False),
    "gpt2": Family(attention=("c_attn", "c_proj"), mlp=("c_fc", "c_proj"), positions=0, **_LAYER_NORM, **_GPT),
    "gpt_neox": Family(
        attention=("query_key_value", "dense"),
        mlp=("dense_h_to_4h", "dense_4h_to_h"),
        tied=False,
        parallel=True,
        layers="gpt_neox.layers",
        attention_at="attention",
        embedding="gpt_neox.embed_in",
        **_LAYER_NORM,
    ),
    "gptj": Family(
        attention=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=("fc_in", "fc_out"),
        norms=1,
        norm_bias=True,
        mlp_bias=True,
        parallel=True,
        tied=False,
        head_bias=True,
        **_GPT,
    ),
    "opt": Family(
        attention=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=("fc1", "fc2"),
        positions=2,
        layers="model.decoder.layers",
        mlp_at="",
        embedding="model.decoder.embed_tokens",
        **_LAYER_NORM,
    ),
    "starcoder2": Family(
        mlp=("c_fc", "c_proj"), norm_bias=True, qkv_bias="use_bias", output_bias="use_bias", mlp_bias="use_bias"
    ),
    "falcon": Family(
        attention=("query_key_value", "dense"),
        mlp=("dense_h_to_4h", "dense_4h_to_h"),
        norms=1,
        norm_bias=True,
        qkv_bias="bias",
        output_bias="bias",
        mlp_bias="bias",
        parallel=True,
        **{**_GPT, "attention_at": "self_attention", "embedding": "transformer.word_embeddings"},
    ),
    "bert": Family(**_BERT),
    "roberta": Family(**_BERT),
}
