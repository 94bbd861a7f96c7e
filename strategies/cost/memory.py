"""Bytes of a training step, by part.

T tokens in a micro-batch, h hidden, f MLP width, q / k query and key-value widths, V vocabulary, g bytes per element.
"""

from strategies.contract import BYTES_PER_ELEMENT, ModelShape, Techniques


def saved_activation_bytes_per_token(shape: ModelShape, element_bytes: int) -> float:
    """What one decoder layer keeps for its backward pass, per token, when its linear maps are frozen.

    RMSNorms keep their fp32 input (2*4h), attention its q, k, v and output (g*(2q + 2k) + 4 per head for the
    log-sum-exp), a gated MLP gate, act(gate) and up (3gf).  Korthikanti et al., arXiv 2205.05198, adapted to
    dropout-free gated models.
    """
    q, k = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    norms = 2 * 4 * shape.hidden_size
    attention = element_bytes * (2 * q + 2 * k) + 4 * shape.num_heads
    mlp = (3 if shape.gated_mlp else 2) * element_bytes * shape.intermediate_size
    return norms + attention + mlp


def activation_bytes(shape: ModelShape, techniques: Techniques, input_bytes_per_token: float) -> float:
    """Peak saved activations of a micro-batch; `input_bytes_per_token` is what trained linear maps keep in one layer.

    With checkpointing each layer keeps only its input, and one layer is alive at a time.
    """
    element_bytes = BYTES_PER_ELEMENT[techniques.dtype]
    per_layer = saved_activation_bytes_per_token(shape, element_bytes) + input_bytes_per_token
    tokens = techniques.micro_batch_tokens
    if techniques.gradient_checkpointing:
        return tokens * (shape.num_layers * element_bytes * shape.hidden_size + per_layer)
    return tokens * shape.num_layers * per_layer


def logits_bytes(shape: ModelShape, num_positions: float) -> float:
    """fp32 logits, their log-softmax and their gradient at the positions where a loss is computed: 12 V bytes each."""
    return 12.0 * shape.vocab_size * num_positions
