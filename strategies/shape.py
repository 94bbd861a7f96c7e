"""The sizes of a transformer that cost memory or time, read from its `config.json`.  No torch.

Parameter counts are exact for every family of `families.py` (tests/strategies/test_shape.py builds each in transformers
and counts).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from clusters.safe.reading import printable
from strategies.families import FAMILIES, Family

_MOST = 2**27  # of any side of a weight: a size beyond it is a mistake in config.json
_MOST_LAYERS = 1024


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
    at: str = ""  # the module of the layer that holds it

    @property
    def path(self) -> str:
        """Its name within the layer, e.g. self_attn.q_proj."""
        return f"{self.at}.{self.name}" if self.at else self.name

    @property
    def num_parameters(self) -> int:
        return self.inputs * self.outputs + self.outputs * self.bias


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
    expert_size: int = 0  # width of one expert
    shared_expert_size: int = 0  # width of the expert that every token goes through
    dense_layers: tuple[int, ...] = ()  # layers without experts, where the others have them
    activation: str = "silu"
    softcap: bool = False  # Gemma 2: no fused kernel computes capped scores
    dropout: bool = False  # masks are kept for the backward pass
    attention_dropout: bool = False  # of the scores: eager products keep a mask of them and a copy
    qk_norm: str | None = None  # where it differs from the family's

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> ModelShape:
        """Read a Hugging Face `config.json`, whose fields may be anything.

        Raises UnknownArchitecture, KeyError for what is missing, and ValueError for what is not of its type or range.
        """
        config = _Config(values)
        model_type, family = config.family()
        hidden = config.whole("hidden_size", "n_embd", "d_model", least=1)
        layers = config.whole("num_hidden_layers", "n_layer", least=1, most=_MOST_LAYERS)
        heads = config.whole("num_attention_heads", "n_head", least=1)
        positions = 0
        if family.positions is not None:
            positions = config.whole("max_position_embeddings", "n_positions", default=512) + family.positions
        embedding = config.whole("word_embed_proj_dim", default=hidden, least=1)
        width = config.whole("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", default=4 * hidden, least=1)
        return cls(
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=_kv_heads(config, heads),
            head_dim=config.whole("head_dim", default=0) or _head_dim(hidden, heads),
            intermediate_size=width,
            vocab_size=config.whole("vocab_size", least=1),
            tied_embeddings=config.flag("tie_word_embeddings", family.tied),
            model_type=model_type,
            biases=config.biases(model_type, family),
            num_positions=positions,
            embedding_size=embedding if embedding != hidden else None,
            final_norm=family.final_norm and config.flag("do_layer_norm_before", True),
            **_experts(config, family, width, layers),
            activation=_activation(config, model_type),
            softcap=config.get("attn_logit_softcapping") is not None,
            qk_norm=family.qk_norm if config.flag("use_qk_norm", model_type != "glm4_moe") else "",
            dropout=any(config.get(key) for key in ("resid_pdrop", "residual_dropout", "hidden_dropout_prob"))
            or (model_type == "opt" and config.get("dropout", 0.1) != 0),
            attention_dropout=any(
                config.get(key) for key in ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")
            ),
        )

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

    @property
    def mlp_width(self) -> int:
        """Width of the MLP that one token passes through: of its experts together, where there are some."""
        if not self.num_experts:
            return self.intermediate_size
        return self.num_experts_per_token * self.expert_size + self.shared_expert_size

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The linear maps of one layer, with experts where some layers have them.

        Experts are not among them: transformers keeps those as stacked tensors.
        """
        return self._attention_maps + (self._shared_maps if self.num_experts else self._mlp_maps)

    def linears_of(self, layer: int) -> tuple[Linear, ...]:
        """The linear maps of a layer."""
        return self._attention_maps + self._mlp_maps if layer in self.dense_layers else self.linears

    @cached_property
    def _attention_maps(self) -> tuple[Linear, ...]:
        h, q, kv, at = self.hidden_size, self.query_size, self.key_value_size, self.family.attention_at
        qkv_bias, output_bias, _ = self.biases
        *inward, output = self.family.attention
        widths = [q + 2 * kv] if len(inward) == 1 else [q, kv, kv]
        maps = [Linear(name, h, width, qkv_bias, at=at) for name, width in zip(inward, widths, strict=True)]
        return (*maps, Linear(output, q, h, output_bias, "attended", at))

    @cached_property
    def _mlp_maps(self) -> tuple[Linear, ...]:
        return self._mlp_of(self.intermediate_size, self.family.mlp_at)

    @cached_property
    def _shared_maps(self) -> tuple[Linear, ...]:
        if not self.shared_expert_size:
            return ()
        maps = self._mlp_of(self.shared_expert_size, self.family.shared_expert)
        if self.model_type != "qwen2_moe":
            return maps
        return (*maps, Linear("shared_expert_gate", self.hidden_size, 1, False, "normed for the MLP", "mlp"))

    def _mlp_of(self, width: int, at: str) -> tuple[Linear, ...]:
        h, bias = self.hidden_size, self.biases[2]
        *inward, output = self.family.mlp
        outward = 2 * width if self.gated_mlp and len(inward) == 1 else width
        maps = [Linear(name, h, outward, bias, "normed for the MLP", at) for name in inward]
        return (*maps, Linear(output, width, h, bias, "product", at))

    @property
    def outside(self) -> dict[str, Linear]:
        """Embedding and output matrix by name, as maps between tokens and vectors."""
        width = self.embedding_size or self.hidden_size
        return {
            self.family.embedding: Linear(self.family.embedding, self.vocab_size, width, reads="tokens"),
            self.family.output: Linear(self.family.output, width, self.vocab_size, self.family.head_bias, "last"),
        }

    @cached_property
    def named_maps(self) -> dict[str, tuple[int | None, Linear]]:
        """Every linear map, embedding and output matrix by its module's name, with its layer."""
        inside = {
            f"{self.family.layers}.{layer}.{linear.path}": (layer, linear)
            for layer in range(self.num_layers)
            for linear in self.linears_of(layer)
        }
        return {**inside, **{name: (None, linear) for name, linear in self.outside.items()}}

    @staticmethod
    def distinct_inputs(linears: Iterable[Linear]) -> int:
        """Widths of the different tensors that these maps read: query, key and value share one, gate and up another."""
        return sum({linear.reads: linear.inputs for linear in linears}.values())

    @cached_property
    def num_linear_parameters(self) -> int:
        """Of all layers' linear maps, biases included, experts not."""
        return sum(linear.num_parameters for layer in range(self.num_layers) for linear in self.linears_of(layer))

    @property
    def num_expert_parameters(self) -> int:
        """Of the experts and their router, over all layers."""
        expert = (3 if self.gated_mlp else 2) * self.hidden_size * self.expert_size
        return (self.num_layers - len(self.dense_layers)) * self.num_experts * (expert + self.hidden_size)

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
        qk = {"": 0, "head": 2 * self.head_dim, "full": self.query_size + self.key_value_size}[
            self.family.qk_norm if self.qk_norm is None else self.qk_norm
        ]
        return width * (self.family.norms * self.num_layers + outside) + qk * self.num_layers

    @property
    def num_parameters(self) -> int:
        in_layers = self.num_linear_parameters + self.num_expert_parameters
        return in_layers + self.num_embedding_parameters + self.num_norm_parameters


def longest_sequence(values: Mapping[str, Any]) -> int | None:
    """The positions that a config.json states; None where it states none.  Raises ValueError."""
    return _Config(values).whole("max_position_embeddings", "n_positions", default=0, most=2**40) or None


def stored_quantised(values: Mapping[str, Any]) -> str | None:
    """How a model's files are quantised, by its config.json, in words; None where they are not."""
    config = _Config(values)
    stated = config.get("quantization_config") or config.get("compression_config")
    if not stated:
        return None
    if not isinstance(stated, Mapping):
        return f"quantization_config: {_shown(stated)}"
    known = {"load_in_4bit": "4 bits", "load_in_8bit": "8 bits"}
    method = stated.get("quant_method") or stated.get("quantization") or "a method without a name"
    bits = stated.get("bits") or stated.get("w_bit")
    words = [f"{bits} bits" if type(bits) is int else None]
    words += [text for key, text in known.items() if stated.get(key) is True]
    return ", ".join([_shown(method).strip("'"), *[word for word in words if word]])


class _Config:
    """The values of a config.json, of which every one may be of any type; those of a text part lie over the rest."""

    def __init__(self, values: Any) -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"it holds a {type(values).__name__}, not an object with named fields")
        text = values.get("text_config") or {}
        if not isinstance(text, Mapping):
            raise ValueError(f"its text_config is {_shown(text)}, not an object with named fields")
        self._values = {**values, **text}

    def get(self, name: str, default: Any = None) -> Any:
        return self._values.get(name, default)

    def family(self) -> tuple[str, Family]:
        model_type = self.get("model_type")
        if not isinstance(model_type, str):
            raise UnknownArchitecture(f"its model_type is {_shown(model_type)}; known: {', '.join(FAMILIES)}")
        if model_type not in FAMILIES:
            raise UnknownArchitecture(f"model_type {_shown(model_type)} is not known; known: {', '.join(FAMILIES)}")
        return model_type, FAMILIES[model_type]

    def whole(self, *names: str, default: int | None = None, least: int = 0, most: int = _MOST) -> int:
        """The first of these fields that is stated, a whole number within bounds."""
        name = next((name for name in names if self.get(name) is not None), None)
        if name is None:
            if default is None:
                raise KeyError(f"the model's config.json has none of {', '.join(names)}")
            return default
        value = self.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"its {name} is {_shown(value)}, not a whole number")
        if not least <= value <= most:
            raise ValueError(f"its sizes are not those of a model: {name} is {_shown(value)}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool) and value not in (0, 1):
            raise ValueError(f"its {name} is {_shown(value)}, neither true nor false")
        return bool(value)

    def layers(self, name: str, num_layers: int) -> tuple[int, ...]:
        """A list of layers' numbers."""
        value = self.get(name) or []
        if not isinstance(value, list) or not all(type(one) is int and 0 <= one < num_layers for one in value):
            raise ValueError(f"its {name} is {_shown(value)}, not a list of layers from 0 to {num_layers - 1}")
        return tuple(sorted(set(value)))

    def biases(self, model_type: str, family: Family) -> tuple[bool, bool, bool]:
        """Whether queries, keys and values, the attention's output, and the MLP have biases."""
        silent = {"attention_bias": model_type == "gpt_neox", "use_bias": True, "qkv_bias": True}
        stated = (family.qkv_bias, family.output_bias, family.mlp_bias)
        qkv, output, mlp = (self.flag(one, silent.get(one, False)) if isinstance(one, str) else one for one in stated)
        return qkv, output, mlp


def _experts(config: _Config, family: Family, width: int, num_layers: int) -> dict[str, Any]:
    """How many experts a model's MLPs have, and where they have none: fields of `ModelShape`."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    if not family.experts:
        if config.whole(*names, default=0):
            raise ValueError(f"it has experts, which models of type {config.get('model_type')} do not have")
        return {}
    number = config.whole(*names, least=1, most=2**16)
    size = config.whole("moe_intermediate_size", default=width, least=1)
    shared = config.whole("shared_expert_intermediate_size", default=0)
    if not shared and family.shared_expert:
        shared = config.whole("n_shared_experts", default=0, most=2**10) * size
    sparse_step = config.whole("decoder_sparse_step", default=1, least=1)
    dense = {layer for layer in range(num_layers) if (layer + 1) % sparse_step}
    dense |= set(config.layers("mlp_only_layers", num_layers))
    dense |= set(range(min(num_layers, config.whole("first_k_dense_replace", default=0))))
    return {
        "num_experts": number,
        "num_experts_per_token": min(number, config.whole("num_experts_per_tok", least=1)),
        "expert_size": size,
        "shared_expert_size": shared,
        "dense_layers": tuple(sorted(dense)),
    }


def _kv_heads(config: _Config, heads: int) -> int:
    if config.flag("multi_query", False) and not config.flag("new_decoder_architecture", False):
        return 1  # Falcon
    return config.whole("num_key_value_heads", "num_kv_heads", default=0, most=heads) or heads


def _head_dim(hidden: int, heads: int) -> int:
    if hidden < heads:
        raise ValueError(f"its sizes are not those of a model: {heads} heads share a width of {hidden}")
    return hidden // heads


def _activation(config: _Config, model_type: str) -> str:
    named = (config.get(key) for key in ("hidden_activation", "hidden_act", "activation_function"))
    silent = {"gpt2": "gelu_new", "gptj": "gelu_new", "opt": "relu", "phi": "gelu_new", "falcon": "gelu"}
    return next((name for name in named if isinstance(name, str) and name), silent.get(model_type, "silu"))


def _shown(value: Any) -> str:
    text = repr(value)
    return printable(text if len(text) <= 60 else f"{text[:57]}...")
