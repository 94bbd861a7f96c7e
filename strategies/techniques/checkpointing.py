"""Gradient checkpointing: keep one activation a layer, compute the others again (Chen et al., arXiv 1604.06174)."""

from typing import Any

from strategies.techniques.technique import Technique

CHECKPOINTING = Technique(
    name="gradient checkpointing",
    about="keeps one activation a layer and computes the others again: one more forward pass",
    switch="train.gradient_checkpointing: true",
    on=lambda choice: choice.with_(gradient_checkpointing=True),
    off=lambda choice: choice.with_(gradient_checkpointing=False),
    saves_first="memory",
)


def enable(model: Any) -> None:
    """Recompute activations in the backward pass.  Saves most activation memory, costs one more forward pass."""
    model.enable_input_require_grads()  # frozen embeddings: without it no gradient reaches the first layer
    turn_on = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    turn_on()
