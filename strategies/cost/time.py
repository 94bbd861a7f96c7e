"""Floating-point operations of a training step."""

from strategies.contract import ModelShape


def forward_flops_per_token(shape: ModelShape, mean_length: float, supervised_fraction: float) -> float:
    """2 FLOPs a weight and token, causal attention over the mean length, logits only where they are supervised."""
    linear = 2.0 * shape.num_linear_parameters
    attention = 2.0 * mean_length * shape.num_heads * shape.head_dim * shape.num_layers
    logits = 2.0 * shape.vocab_size * shape.hidden_size * supervised_fraction
    return linear + attention + logits


def training_flops_per_token(forward: float, weight_gradients: bool, gradient_checkpointing: bool) -> float:
    """Forward once (twice with checkpointing), input gradients once, weight gradients once if the weights train."""
    return forward * (2 + weight_gradients + gradient_checkpointing)
