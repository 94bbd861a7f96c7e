"""What the layers of each known model_type consist of: a new family is one entry in families.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Family:
    """What the layers of one model_type consist of.

    `attention` and `mlp` name the linear maps; one map before the last is a fused one.  `norm_names` are those of width
    hidden_size in a layer, `qk_norm` says how wide those of queries and keys are.  Three tables speak of config.json:
    what it leaves out is filled in from `silent`, as the configuration class does; an entry of `where` changes fields
    of the family where the flag of its `key` is `is`; a key of `only` has that value or the model is refused.
    """

    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    kv_heads: str = "num_key_value_heads"  # the config's key of their number; none where queries have as many
    reads_head_dim: bool = True  # whether config.json may state a width of heads
    norm_names: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    last_norm: str = "model.norm"
    norm_bias: bool = False  # LayerNorm with bias; without it RMSNorm
    qkv_bias: bool | str = False  # a string names the config's key
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: str = ""  # "head": width head_dim; "full": over all heads
    qk_norm_bias: bool = False
    qk_norms: tuple[str, ...] = ("q_norm", "k_norm")
    positions: int | None = None  # learned position embeddings: how many more than the config says
    positions_at: str = ""
    projections_at: str = ""  # the module that holds project_in and project_out, where embeddings have a width apart
    tied: bool = False  # when config.json is silent
    head_bias: bool = False
    final_norm: bool = True
    parallel: bool = False  # attention and MLP read one normed input
    encoder: bool = False
    activation: str = "silu"  # when config.json is silent
    width: str = "intermediate_size"  # the config's key of the MLP's width; four times the hidden size where it is null
    expert_width: str = ""  # the config's key of an expert's width, where its MLPs are experts, all or most of them
    dense: tuple[str, ...] = ()  # the config's keys that say which layers have no experts
    shared_expert: str = ""  # where the expert that every token goes through lies
    shared_width: str = ""  # the config's key of its width
    num_shared: str = ""  # the config's key of how many times an expert's width it is, where that is stated instead
    shared_gate: str = ""  # the map that weighs its output
    router: str = "gate"
    earlier_maps: tuple[str, ...] = ()  # names of an expert's maps before they were stacked, which PEFT still takes
    layers: str = "model.layers"
    attention_at: str = "self_attn"
    mlp_at: str = "mlp"
    experts_at: str = "mlp"  # the module that holds the router and the stacked experts
    embedding: str = "model.embed_tokens"
    output: str = "lm_head"
    silent: Mapping[str, Any] = field(default_factory=dict)
    where: tuple[Mapping[str, Any], ...] = ()
    only: Mapping[str, Any] = field(default_factory=dict)
    scored: bool = True  # whether transformers has a model of it that gives documents a score
    uncut: str = ""  # why its layers cannot be computed on several machines in turn

    @property
    def norms(self) -> int:
        """Norms of width hidden_size in a layer."""
        return len(self.norm_names)

    @property
    def experts(self) -> bool:
        """Whether its MLPs are experts, all or most of them."""
        return bool(self.expert_width)


def _read(file: Path) -> dict[str, Family]:
    listed = tomllib.loads(file.read_text(encoding="utf-8"))

    def keys_of(name: str) -> dict[str, Any]:
        own = {key: _frozen(value) for key, value in listed[name].items()}
        if "like" not in own:
            return own
        other = keys_of(own.pop("like"))
        return other | own | {"silent": other.get("silent", {}) | own.get("silent", {})}

    return {name: Family(**keys_of(name)) for name in listed}


def _frozen(value: Any) -> Any:
    """Lists as tuples, those inside `where` too: a family's fields are compared and hashed."""
    if isinstance(value, list):
        return tuple(_frozen(one) for one in value)
    return {key: _frozen(one) for key, one in value.items()} if isinstance(value, dict) else value


FAMILIES: dict[str, Family] = _read(Path(__file__).with_suffix(".toml"))
