"""Gradient checkpointing: keep one activation a layer, compute the others again (Chen et al., arXiv 1604.06174)."""

from typing import Any


def enable(model: Any) -> None:
    """Recompute activations in the backward pass.  Saves most activation memory, costs one more forward pass."""
    model.enable_input_require_grads()  # frozen embeddings: without it no gradient reaches the first layer
    turn_on = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    turn_on()
