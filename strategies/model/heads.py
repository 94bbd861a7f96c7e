"""What a model ends in: its output matrix, or a score in its place (transformers' models for sequence classification).

Legend: B rows, T tokens, V vocabulary, H hidden size, D documents.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

from strategies.shape import SCORE

if TYPE_CHECKING:  # planning looks at heads of models that nobody built
    import torch


_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def inner_model(model: Any) -> Any:
    """The model without an engine or an adapter around it."""
    model = getattr(model, "module", model)  # an engine's
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def masked_kernel(model: Any) -> str:
    """The attention for padded rows: torch's fused one, or `eager` where the model's code has no other (Gemma 2)."""
    return "sdpa" if getattr(inner_model(model), "_supports_sdpa", True) else "eager"


def cache_keyword(model: Any) -> str:
    """How a model's forward pass names the cache of keys and values: transformers 5.24 has another name than 5.23."""
    return "cache" if "cache" in inspect.signature(inner_model(model).forward).parameters else "past_key_values"


def has_score(model: Any) -> bool:
    """Whether a model gives documents a score and has no output matrix."""
    return hasattr(inner_model(model), SCORE)


def output_of(model: Any) -> Any:
    """The module of the output matrix, or of the score; None of a model with neither."""
    return getattr(model, SCORE, None) or model.get_output_embeddings()


def outside_layers(model: Any) -> list[Any]:
    """Parameters of embeddings and of the output matrix or score, copies that train in their place included."""
    inner = inner_model(model)
    parts = (inner.get_input_embeddings(), output_of(inner))
    return [parameter for part in parts if part is not None for parameter in part.parameters()]


def undecayed(model: Any) -> list[Any]:
    """Norms and biases, from which transformers' Trainer keeps weight decay (its get_decay_parameter_names)."""
    from torch.nn import LayerNorm

    of_norms = [
        parameter for module in model.modules() if isinstance(module, LayerNorm) for parameter in module.parameters()
    ]
    named = model.named_parameters(remove_duplicate=False)
    return of_norms + [parameter for name, parameter in named if _UNDECAYED.search(name.lower())]


def hidden_states(model: Any, ids_BT: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """What the last layer makes of each token (B, T, H), of a model that has a score."""
    inner = inner_model(model)
    body = getattr(inner, inner.base_model_prefix)
    return body(ids_BT, **arguments).last_hidden_state


def outputs(model: Any, ids_BT: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """What a model makes of each token: logits (B, T, V), of a model that has a score the hidden states (B, T, H)."""
    if has_score(model):
        return hidden_states(model, ids_BT, **arguments)
    return model(ids_BT, **arguments).logits


def scores(model: Any, hidden_DH: torch.Tensor) -> torch.Tensor:
    """The score of each hidden state (D,), computed in the precision of the score's own weights."""
    import torch

    score = getattr(inner_model(model), SCORE)
    dtype = next(score.parameters()).dtype
    with torch.autocast(hidden_DH.device.type, enabled=False):
        return score(hidden_DH.to(dtype))[:, 0]


def begin_score(model: Any, seed: int) -> None:
    """Draw the weights of a score that no file holds: the same on every device."""
    import torch

    weight = getattr(inner_model(model), SCORE).weight
    drawn = torch.empty(weight.shape).normal_(
        0.0, model.config.get_text_config().initializer_range, generator=torch.Generator().manual_seed(seed)
    )
    with torch.no_grad():
        weight.copy_(drawn)
