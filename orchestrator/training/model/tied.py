"""Merges adapters of a model whose output matrix is its embedding, which must be separated first."""

from __future__ import annotations

from typing import Any

import torch


def merged_model(model: Any) -> Any:
    """Base and adapter merged into a plain model; a model without an adapter as it is.

    Where embedding and output matrix are one tensor and either of them is adapted, they are separated first, and the
    model's config says so: merged in place, one's correction would change the other, and saved as tied, one is lost.
    """
    if not hasattr(model, "merge_and_unload"):
        return model
    base = model.get_base_model()
    if _are_tied(base) and (_is_adapted(base.get_input_embeddings()) or _is_adapted(base.get_output_embeddings())):
        _untie(base)
    return model.merge_and_unload(safe_merge=True)


def _are_tied(model: Any) -> bool:
    output = model.get_output_embeddings()
    return output is not None and _weight(model.get_input_embeddings()) is _weight(output)


def _is_adapted(module: Any) -> bool:
    """Whether PEFT has replaced a module."""
    return hasattr(module, "base_layer") or hasattr(module, "modules_to_save")


def _untie(model: Any) -> None:
    inner = _inner(model.get_output_embeddings())
    inner.weight = torch.nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False


def _inner(module: Any) -> Any:
    """The module that PEFT wrapped: the original one, whose weight may be shared."""
    while True:
        wrapped = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if wrapped is None:
            return module
        module = wrapped


def _weight(module: Any) -> Any:
    return getattr(_inner(module), "weight", None)
