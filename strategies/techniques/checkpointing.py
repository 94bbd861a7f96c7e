"""Gradient checkpointing: keep one activation a layer, compute the others again (Chen et al., arXiv 1604.06174)."""

from typing import Any


def enable(model: Any) -> None:
    """Recompute activations in the backward pass.  Saves most activation memory, costs one more forward pass.

    transformers lets the embedding's output require a gradient, which reentrant checkpoints of frozen layers need; then
    the backward pass goes down through all layers, those below the lowest that trains included.  Others do without.
    """
    turn_on = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    turn_on()
    calls = [m._gradient_checkpointing_func for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    if calls and all(getattr(call, "keywords", {}).get("use_reentrant") is False for call in calls):
        model.disable_input_require_grads()
    else:  # a model's own code of an older form
        model.enable_input_require_grads()
