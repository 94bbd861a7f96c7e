"""The sizes of a transformer that cost memory or time, read from its `config.json`.  No torch.

A family states what its layers are made of; parameter counts are exact for every family in `FAMILIES`
(tests/strategies/test_shape.py builds each in transformers and counts).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any


class UnknownArchitecture(ValueError):
    """A `model_type` whose layers are not described here; the text names those that are."""


@dataclass(frozen=True)
class Linear:
    """One linear map of a decoder layer; `name` is the module's last name, as LoRA's targets spell it."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    reads: str = "normed"  # the tensor it reads: normed | attended | normed for the MLP | product

    @property
    def num_parameters(self) -> int:
        return self.inputs * self.outputs + self.outputs * self.bias


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
    **_LAYER_NORM,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(**_LLAMA),
    "mistral": Family(tied=False),
    "mixtral": Family(tied=False),
    "smollm3": Family(**{**_LLAMA, "tied": True}),
    "granite": Family(**{**_LLAMA, "tied": True}),
    "qwen2": Family(qkv_bias=True, tied=False),
    "qwen3": Family(qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="head", tied=False),
    "qwen3_moe": Family(qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="head", tied=False),
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
    "gpt2": Family(attention=("c_attn", "c_proj"), mlp=("c_fc", "c_proj"), positions=0, **_LAYER_NORM),
    "gpt_neox": Family(
        attention=("query_key_value", "dense"),
        mlp=("dense_h_to_4h", "dense_4h_to_h"),
        tied=False,
        parallel=True,
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
    ),
    "opt": Family(attention=("q_proj", "k_proj", "v_proj", "out_proj"), mlp=("fc1", "fc2"), positions=2, **_LAYER_NORM),
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
    ),
    "bert": Family(**_BERT),
    "roberta": Family(**_BERT),
}


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a transformer; `family` says what they are the sizes of."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool
    model_type: str = "llama"
    biases: tuple[bool, bool, bool] = (False, False, False)  # of q/k/v, of the attention's output, of the MLP
    num_positions: int = 0  # learned position embeddings
    embedding_size: int | None = None  # where it differs from hidden_size (OPT-350M)
    final_norm: bool = True
    num_experts: int = 0
    num_experts_per_token: int = 0
    activation: str = "silu"
    softcap: bool = False  # Gemma 2: no fused kernel computes capped scores
    dropout: bool = False  # masks are kept for the backward pass

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read a Hugging Face `config.json`.  Raises UnknownArchitecture, KeyError and ValueError."""
        config = {**config, **config.get("text_config", {})}
        model_type = config.get("model_type", "llama")
        family = FAMILIES.get(model_type)
        if family is None:
            raise UnknownArchitecture(f"model_type {model_type!r} is not known; known: {', '.join(FAMILIES)}")
        hidden = _first(config, "hidden_size", "n_embd", "d_model")
        heads = _first(config, "num_attention_heads", "n_head")
        given = {
            "attention_bias": model_type == "gpt_neox",
            "mlp_bias": False,
            "use_bias": True,
            "bias": False,
            **config,
        }
        biases = (family.qkv_bias, family.output_bias, family.mlp_bias)
        positions = 0
        if family.positions is not None:
            positions = _first(config, "max_position_embeddings", "n_positions", default=512) + family.positions
        embedding = config.get("word_embed_proj_dim")
        sizes = cls(
            hidden_size=hidden,
            num_layers=_first(config, "num_hidden_layers", "n_layer"),
            num_heads=heads,
            num_kv_heads=_kv_heads(config, heads),
            head_dim=config.get("head_dim") or hidden // heads,
            intermediate_size=_first(
                config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", default=4 * hidden
            ),
            vocab_size=_first(config, "vocab_size"),
            tied_embeddings=bool(config.get("tie_word_embeddings", family.tied)),
            model_type=model_type,
            biases=(
                bool(given[biases[0]] if isinstance(biases[0], str) else biases[0]),
                bool(given[biases[1]] if isinstance(biases[1], str) else biases[1]),
                bool(given[biases[2]] if isinstance(biases[2], str) else biases[2]),
            ),
            num_positions=positions,
            embedding_size=embedding if embedding != hidden else None,
            final_norm=family.final_norm and config.get("do_layer_norm_before", True),
            num_experts=config.get("num_local_experts") or config.get("num_experts") or 0,
            num_experts_per_token=config.get("num_experts_per_tok") or 0,
            activation=_activation(config),
            softcap=config.get("attn_logit_softcapping") is not None,
            dropout=any(config.get(key) for key in ("resid_pdrop", "residual_dropout", "hidden_dropout_prob"))
            or (model_type == "opt" and config.get("dropout", 0.1) > 0),
        )
        wrong = [name for name, value in vars(sizes).items() if type(value) is int and value < 0]
        if wrong or min(hidden, sizes.num_layers, heads, sizes.head_dim, sizes.vocab_size) < 1:
            raise ValueError(f"its sizes are not those of a model: {', '.join(wrong) or 'one of them is 0'}")
        return sizes

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def gated_mlp(self) -> bool:
        return self.family.mlp[0] in ("gate_proj", "gate_up_proj")

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The linear maps of one layer.  Experts are not among them: transformers keeps those as stacked tensors."""
        h, q, kv, f = self.hidden_size, self.query_size, self.key_value_size, self.intermediate_size
        qkv_bias, output_bias, mlp_bias = self.biases
        *inward, output = self.family.attention
        widths = [q + 2 * kv] if len(inward) == 1 else [q, kv, kv]
        maps = [Linear(name, h, width, qkv_bias) for name, width in zip(inward, widths, strict=True)]
        maps.append(Linear(output, q, h, output_bias, "attended"))
        if not self.num_experts:
            *inward, output = self.family.mlp
            width = 2 * f if self.gated_mlp and len(inward) == 1 else f
            maps += [Linear(name, h, width, mlp_bias, "normed for the MLP") for name in inward]
            maps.append(Linear(output, f, h, mlp_bias, "product"))
        return tuple(maps)

    def targeted(self, target_modules: str | list[str]) -> tuple[Linear, ...]:
        """The linear maps of a layer that PEFT's `target_modules` means: all-linear, a regex, or names."""
        if target_modules == "all-linear":
            return self.linears
        if isinstance(target_modules, list):
            return tuple(linear for linear in self.linears if linear.name in target_modules)
        return tuple(one for one in self.linears if re.fullmatch(target_modules, f"model.layers.0.{one.name}"))

    @staticmethod
    def distinct_inputs(linears: Iterable[Linear]) -> int:
        """Widths of the different tensors that these maps read: query, key and value share one, gate and up another."""
        return sum({linear.reads: linear.inputs for linear in linears}.values())

    @property
    def num_linear_parameters(self) -> int:
        """Of all layers' linear maps, biases included, experts not."""
        return self.num_layers * sum(linear.num_parameters for linear in self.linears)

    @property
    def num_expert_parameters(self) -> int:
        """Of the experts and their router, over all layers."""
        expert = (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size
        return self.num_layers * self.num_experts * (expert + self.hidden_size)

    @property
    def num_active_parameters(self) -> int:
        """Weights of the layers that one token is multiplied with."""
        if not self.num_experts:
            return self.num_linear_parameters
        share = self.num_experts_per_token / self.num_experts
        return self.num_linear_parameters + int(self.num_expert_parameters * share)

    @property
    def num_embedding_parameters(self) -> int:
        """Token embedding and output matrix (one tensor when tied), positions, projections, the output's bias."""
        width = self.embedding_size or self.hidden_size
        tokens = self.vocab_size * width * (1 if self.tied_embeddings else 2)
        projections = 2 * width * self.hidden_size if self.embedding_size else 0
        types = 2 * self.hidden_size if self.family.encoder else 0
        bias = self.vocab_size * self.family.head_bias
        return tokens + projections + types + bias + self.num_positions * self.hidden_size

    @property
    def num_norm_parameters(self) -> int:
        width = self.hidden_size * (1 + self.family.norm_bias)
        outside = int(self.final_norm) + int(self.family.encoder)
        qk = {"": 0, "head": 2 * self.head_dim, "full": self.query_size + self.key_value_size}[self.family.qk_norm]
        return width * (self.family.norms * self.num_layers + outside) + qk * self.num_layers

    @property
    def num_parameters(self) -> int:
        in_layers = self.num_linear_parameters + self.num_expert_parameters
        return in_layers + self.num_embedding_parameters + self.num_norm_parameters


def _first(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        if config.get(name) is not None:
            return int(config[name])
    if default is None:
        raise KeyError(f"the model's config.json has none of {', '.join(names)}")
    return default


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1  # Falcon
    return config.get("num_key_value_heads") or config.get("num_kv_heads") or heads


def _activation(config: Mapping[str, Any]) -> str:
    named = (config.get(key) for key in ("hidden_activation", "hidden_act", "activation_function"))
    silent = {"gpt2": "gelu_new", "gptj": "gelu_new", "opt": "relu", "phi": "gelu_new", "falcon": "gelu"}
    return next((name for name in named if name), silent.get(config.get("model_type", ""), "silu"))
