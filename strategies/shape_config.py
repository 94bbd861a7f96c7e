"""The sizes that a config.json states in several ways: experts, heads, the activation.  No torch."""

from __future__ import annotations

from typing import Any

from strategies.config_values import ConfigValues
from strategies.families import Family


def experts(config: ConfigValues, family: Family, num_layers: int) -> dict[str, Any]:
    """How many experts a model's MLPs have, how wide, and where they have none: fields of `ModelShape`."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    if not family.experts:
        if config.whole(*names, default=0):
            raise ValueError(f"it has experts, which models of type {config.get('model_type')} do not have")
        return {}
    number = config.whole(*names, least=1, most=2**16)
    size = config.whole(family.expert_width, least=1)
    shared = config.whole(family.shared_width) if family.shared_width else 0
    if family.num_shared:
        shared = config.whole(family.num_shared, least=1, most=2**10) * size
    return {
        "num_experts": number,
        "num_experts_per_token": min(number, config.whole("num_experts_per_tok", least=1)),
        "expert_size": size,
        "shared_expert_size": shared,
        "dense_layers": _dense_layers(config, family, num_layers),
    }


def _dense_layers(config: ConfigValues, family: Family, num_layers: int) -> tuple[int, ...]:
    """The layers that have one MLP and no experts, by the keys that this family's configuration reads."""
    dense: set[int] = set()
    if "decoder_sparse_step" in family.dense:
        step = config.whole("decoder_sparse_step", default=1, least=1)
        dense |= {layer for layer in range(num_layers) if (layer + 1) % step}
    if "mlp_only_layers" in family.dense:
        dense |= set(config.layers("mlp_only_layers", num_layers))
    if "first_k_dense_replace" in family.dense:
        dense |= set(range(min(num_layers, config.whole("first_k_dense_replace", default=0))))
    return tuple(sorted(dense))


def kv_heads(config: ConfigValues, family: Family, heads: int) -> int:
    if family.kv_heads == "num_kv_heads" and not config.flag("new_decoder_architecture", False):  # Falcon
        return 1 if config.flag("multi_query", False) else heads
    return config.whole(family.kv_heads, default=0, most=heads) or heads if family.kv_heads else heads


def head_dim(hidden: int, heads: int) -> int:
    if hidden < heads:
        raise ValueError(f"its sizes are not those of a model: {heads} heads share a width of {hidden}")
    return hidden // heads


def activation(config: ConfigValues, family: Family) -> str:
    named = (config.get(key) for key in ("hidden_activation", "hidden_act", "activation_function", "activation"))
    return next((name for name in named if isinstance(name, str) and name), family.activation)
