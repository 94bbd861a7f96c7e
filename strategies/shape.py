"""The sizes of a transformer that cost memory or time, read from its `config.json`.  No torch.

Parameter counts are exact for every family of `families.py` (tests/strategies/test_shape.py builds each in transformers
and counts).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from strategies.config_values import ConfigValues
from strategies.families import FAMILIES, Family
from strategies.shape_config import activation, experts, head_dim, kv_heads

_MOST_LAYERS = 1024
SCORE = "score"  # the module of transformers' models for sequence classification


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

    @cached_property
    def num_parameters(self) -> int:
        return self.inputs * self.outputs + self.outputs * self.bias


@dataclass(frozen=True)
class Part:
    """A module whose parameters are those of no linear map: a norm, a router, positions."""

    num_parameters: int
    reads: str = "normed"


@dataclass(frozen=True)
class ExpertStack:
    """One linear map of all experts of a layer, which transformers keeps in one tensor."""

    name: str
    num_experts: int
    inputs: int
    outputs: int

    @cached_property
    def num_parameters(self) -> int:
        return self.num_experts * self.inputs * self.outputs


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
    variant: tuple[tuple[str, Any], ...] = ()  # fields of the family that this model's config.json changes
    biases: tuple[bool, bool, bool] = (False, False, False)  # of q/k/v, of the attention's output, of the MLP
    num_positions: int = 0  # learned position embeddings
    embedding_size: int | None = None  # where it differs from hidden_size (OPT-350M)
    num_experts: int = 0
    num_experts_per_token: int = 0
    expert_size: int = 0  # width of one expert
    shared_expert_size: int = 0  # width of the expert that every token goes through
    dense_layers: tuple[int, ...] = ()  # layers without experts, where the others have them
    activation: str = "silu"
    softcap: bool = False  # Gemma 2: no fused kernel computes capped scores
    dropout: bool = False  # masks are kept for the backward pass
    attention_dropout: bool = False  # of the scores: eager products keep a mask of them and a copy
    num_scores: int = 0  # rows of the score that stands in place of the output matrix; 0 = there is the output matrix

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> ModelShape:
        """Read a Hugging Face `config.json`, whose fields may be anything.

        Raises UnknownArchitecture, KeyError for what is missing, and ValueError for what is not of its type or range.
        """
        config = ConfigValues(values)
        model_type, family = config.family()
        variant = config.variant(family)
        family = replace(family, **dict(variant))
        hidden = config.whole("hidden_size", "n_embd", "d_model", least=1)
        layers = config.whole("num_hidden_layers", "n_layer", least=1, most=_MOST_LAYERS)
        heads = config.whole("num_attention_heads", "n_head", least=1)
        positions = 0
        if family.positions is not None:
            positions = config.whole("max_position_embeddings", "n_positions") + family.positions
        embedding = config.whole("word_embed_proj_dim", default=hidden, least=1)
        return cls(
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads(config, family, heads),
            head_dim=(family.reads_head_dim and config.whole("head_dim", default=0)) or head_dim(hidden, heads),
            intermediate_size=config.whole(family.width, default=4 * hidden, least=1),
            vocab_size=config.whole("vocab_size", least=1),
            tied_embeddings=config.flag("tie_word_embeddings", family.tied),
            model_type=model_type,
            variant=variant,
            biases=config.biases(family),
            num_positions=positions,
            embedding_size=embedding if embedding != hidden else None,
            **experts(config, family, layers),
            activation=activation(config, family),
            softcap=config.get("attn_logit_softcapping") is not None,
            dropout=config.has_dropout("resid_pdrop", "residual_dropout", "hidden_dropout_prob", "dropout"),
            attention_dropout=config.has_dropout("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob"),
        )

    @cached_property
    def family(self) -> Family:
        family = FAMILIES[self.model_type]
        return replace(family, **dict(self.variant)) if self.variant else family

    @property
    def has_embedding(self) -> bool:
        return True  # in a pipeline only on the first stage

    @property
    def has_output(self) -> bool:
        return True  # in a pipeline only on the last stage

    def with_score(self) -> ModelShape:
        """The sizes of the same model with one score a document in place of its output matrix.

        Raises ValueError for a family that transformers has no such model of.
        """
        if not self.family.scored:
            raise ValueError(f"transformers has no {self.model_type} model that gives documents a score")
        return replace(self, tied_embeddings=False, num_scores=1)

    @property
    def output_name(self) -> str:
        """The module of the output matrix, or of what stands in its place."""
        return SCORE if self.num_scores else self.family.output

    @property
    def output_rows(self) -> int:
        """Numbers that the last product gives for a position."""
        return self.num_scores or self.vocab_size

    @property
    def has_head_bias(self) -> bool:
        return self.family.head_bias and not self.num_scores

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def embedding_width(self) -> int:
        return self.embedding_size or self.hidden_size

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
        if not self.family.shared_gate:
            return maps
        at, name = self.family.shared_gate.rsplit(".", 1)
        return (*maps, Linear(name, self.hidden_size, 1, False, "normed for the MLP", at))

    def _mlp_of(self, width: int, at: str) -> tuple[Linear, ...]:
        h, bias = self.hidden_size, self.biases[2]
        *inward, output = self.family.mlp
        outward = 2 * width if self.gated_mlp and len(inward) == 1 else width
        maps = [Linear(name, h, outward, bias, "normed for the MLP", at) for name in inward]
        return (*maps, Linear(output, width, h, bias, "product", at))

    @property
    def outside(self) -> dict[str, Linear]:
        """Embedding and output matrix by name, as maps between tokens and vectors."""
        width = self.embedding_width
        return {
            self.family.embedding: Linear(self.family.embedding, self.vocab_size, width, reads="tokens"),
            self.output_name: Linear(self.output_name, width, self.output_rows, self.has_head_bias, "last"),
        }

    @cached_property
    def named_maps(self) -> dict[str, tuple[int | None, Linear]]:
        """Every linear map, embedding and output matrix by its module's name, with its layer."""
        inside = {
            f"{self.family.layers}.{layer}.{linear.path}": (layer, linear)
            for layer in range(self.num_layers)
            for linear in self.linears_of(layer)
        }
        return {**inside, **{name: (None, linear) for name, linear in (self._projections | self.outside).items()}}

    @property
    def _projections(self) -> dict[str, Linear]:
        """The maps between embeddings of a width apart and the layers."""
        if not self.embedding_size:
            return {}
        at, width, h = self.family.projections_at, self.embedding_size, self.hidden_size
        return {
            f"{at}.project_in": Linear("project_in", width, h, reads="embedded", at=at),
            f"{at}.project_out": Linear("project_out", h, width, reads="projected", at=at),
        }

    @cached_property
    def named_stacks(self) -> dict[str, tuple[int, ExpertStack]]:
        """Every stacked tensor of experts by its parameter's name, with its layer."""
        h, f, number, family = self.hidden_size, self.expert_size, self.num_experts, self.family
        stacks = (ExpertStack("gate_up_proj", number, h, 2 * f), ExpertStack("down_proj", number, f, h))
        return {
            f"{family.layers}.{layer}.{family.experts_at}.experts.{stack.name}": (layer, stack)
            for layer in range(self.num_layers)
            if number and layer not in self.dense_layers
            for stack in stacks
        }

    @cached_property
    def named_parts(self) -> dict[str, tuple[int | None, Part]]:
        """Every other module with parameters by its name, with its layer."""
        family, found = self.family, {}
        norm = self.hidden_size * (1 + family.norm_bias)
        for layer in range(self.num_layers):
            at = f"{family.layers}.{layer}"
            found |= {f"{at}.{name}": (layer, Part(norm)) for name in family.norm_names}
            if family.qk_norm:
                names = (f"{at}.{family.attention_at}.{name}" for name in family.qk_norms)
                found |= {name: (layer, Part(size)) for name, size in zip(names, self._qk_norm_sizes, strict=True)}
            if self.num_experts and layer not in self.dense_layers:
                router = Part(self.num_experts * self.hidden_size, "normed for the MLP")
                found[f"{at}.{family.experts_at}.{family.router}"] = (layer, router)
        if family.final_norm:
            found[family.last_norm] = (None, Part(norm, "last"))
        if family.positions_at:
            found[family.positions_at] = (None, Part(self.num_positions * self.hidden_size, "tokens"))
        return found

    @cached_property
    def num_bias_parameters(self) -> int:
        """Of all biases: those of linear maps, of norms and of the output matrix."""
        linears = sum(one.outputs * one.bias for layer in range(self.num_layers) for one in self.linears_of(layer))
        norms = self.family.norms * self.num_layers + self.family.final_norm
        qk = self.num_layers * sum(self._qk_norm_sizes) // 2 if self.family.qk_norm_bias else 0
        head = self.vocab_size * self.has_head_bias
        return linears + self.family.norm_bias * norms * self.hidden_size + qk + head

    @staticmethod
    def distinct_inputs(linears: Iterable[Linear]) -> int:
        """Widths of the different tensors that these maps read: query, key and value share one, gate and up another."""
        return sum({linear.reads: linear.inputs for linear in linears}.values())

    @cached_property
    def num_linear_parameters(self) -> int:
        """Of all layers' linear maps, biases included, experts not."""
        return sum(linear.num_parameters for layer in range(self.num_layers) for linear in self.linears_of(layer))

    @property
    def num_expert_layers(self) -> int:
        return self.num_layers - len(self.dense_layers) if self.num_experts else 0

    @property
    def num_router_parameters(self) -> int:
        """Of what chooses experts, over all layers."""
        return self.num_expert_layers * self.num_experts * self.hidden_size

    @property
    def num_expert_parameters(self) -> int:
        """Of the experts, over all layers, what every token goes through not among them."""
        expert = (3 if self.gated_mlp else 2) * self.hidden_size * self.expert_size
        return self.num_expert_layers * self.num_experts * expert

    @cached_property
    def num_active_parameters(self) -> int:
        """All but the experts that a token is not sent to: what model cards call active, embeddings included."""
        return self.num_parameters - self._num_idle_parameters

    @cached_property
    def num_product_weights(self) -> int:
        """Weights of the layers that one token's vectors are multiplied with: maps, routers, its own experts."""
        maps = sum(one.inputs * one.outputs for layer in range(self.num_layers) for one in self.linears_of(layer))
        return maps + self.num_router_parameters + self.num_expert_parameters - self._num_idle_parameters

    def active_part(self, num_parameters: int) -> int:
        """Of parameters of experts, those that one token is sent to."""
        return num_parameters // self.num_experts * self.num_experts_per_token if self.num_experts else 0

    @property
    def _num_idle_parameters(self) -> int:
        """Of the experts that a token is not sent to."""
        return self.num_expert_parameters - self.active_part(self.num_expert_parameters)

    @property
    def num_embedding_parameters(self) -> int:
        """Token embedding and output matrix (one tensor when tied), positions, projections, the output's bias."""
        width = self.embedding_width
        tokens = width * (self.vocab_size + (0 if self.tied_embeddings else self.output_rows))
        projections = 2 * width * self.hidden_size if self.embedding_size else 0
        types = 2 * self.hidden_size if self.family.encoder else 0
        bias, positions = self.vocab_size * self.has_head_bias, self.num_positions * self.hidden_size
        return tokens + projections + types + bias + positions

    @property
    def num_norm_parameters(self) -> int:
        width = self.hidden_size * (1 + self.family.norm_bias)
        outside = int(self.family.final_norm) + int(self.family.encoder)
        return width * (self.family.norms * self.num_layers + outside) + sum(self._qk_norm_sizes) * self.num_layers

    @property
    def _qk_norm_sizes(self) -> tuple[int, int]:
        """Parameters of the norms of a layer's queries and keys."""
        widths = {"": (0, 0), "head": (self.head_dim,) * 2, "full": (self.query_size, self.key_value_size)}
        query, key = widths[self.family.qk_norm]
        return query * (1 + self.family.qk_norm_bias), key * (1 + self.family.qk_norm_bias)

    @cached_property
    def num_parameters(self) -> int:
        in_layers = self.num_linear_parameters + self.num_router_parameters + self.num_expert_parameters
        return in_layers + self.num_embedding_parameters + self.num_norm_parameters
