"""What products, attention and experts cost a GPU beyond their FLOPs.  Pure arithmetic.

A product of T rows reads its rows and weights and writes its result; the launch's ramps, its last wave and the loads
that no arithmetic hides add to the arithmetic: `2 T i o / R + g (T i + i o + T o) / B` seconds, the sum of the two
sides of the roofline (Williams et al., 2009) rather than the larger.  So it runs at half of the rate R at g R / 2 B
rows, and narrow layers, where i or o comes near that, and low-rank ones, whose rank is far below, never reach R.
"""

from __future__ import annotations

from functools import lru_cache

from clusters.capability import DeviceCapability
from strategies.cost.work import Work
from strategies.shape import ModelShape
from strategies.workload import BYTES_PER_ELEMENT, Techniques, Workload

# Of the products' rate, forward and backward together, on long rows.  FlashAttention-2 reaches 73 % of an A100's peak
# forward and 63 % backward (arXiv 2307.08691); on an H100, whose asynchronous units it does not use, 335 of 989 TFLOP/s
# (ibid.; 35 % in arXiv 2407.08608).
_FLASH = 0.82
_FLASH_ON_HOPPER = 0.42
_OTHER_ATTENTION = 0.5
# Rows at which attention runs at half of that.  The same algorithm in Triton's tutorial 06, causal, on an A100 reaches
# 112, 136, 150, 160 and 164 TFLOP/s forward at 1k to 16k tokens, 60, 76 and 88 backward at 1k to 4k: 168 s / (s + 500)
# and 101 s / (s + 700).
_HALF_RATE_LENGTH = 512.0
# Eager attention writes the scores: what one passes through memory, forward and backward (product, scale, mask, softmax
# in fp32 with its casts, product, and the same back), by bytes of an element.
_SCORE_BYTES = {2: 64.0, 4: 88.0}
_ROUTING_OPERATIONS = 20  # softmax, top k, sort, histogram, offsets, gathers, sum: grouped_mm_experts_forward
_LARGE_CACHE_SHARE = 0.65
_LOGIT_BYTES = 40.0  # written, copied to fp32, log-softmax, gradient and its cast
_ROUTED_BYTES = 12.0  # an element of a token sent to an expert: gathered, scaled and summed, forward and backward


def product_bytes(workload: Workload, techniques: Techniques, work: Work, tokens: float) -> float:
    """Bytes that the products of a micro-batch of that many tokens read and write, all passes."""
    shape = workload.shape
    trained_share = (shape.num_layers - work.first_layer) / shape.num_layers
    passes = 1 + work.reference_passes
    passes += trained_share * (1 + work.trains_weights + techniques.gradient_checkpointing)
    moved = passes * (tokens * _sides(shape) + _read_weights(shape, tokens))
    adapter_passes = 3 + techniques.gradient_checkpointing
    moved += adapter_passes * tokens * work.adapter_inputs * (shape.num_layers - work.first_layer)
    head_passes = 2 + work.trains_output + (techniques.loss_type == "chunked_nll") + work.reference_passes
    supervised, h, vocabulary = tokens * workload.supervised_fraction, shape.hidden_size, shape.output_rows
    moved += shape.has_output * head_passes * (supervised * (h + vocabulary) + h * vocabulary)
    return BYTES_PER_ELEMENT[techniques.dtype] * moved


@lru_cache(maxsize=64)
def _sides(shape: ModelShape) -> float:
    """Inputs and outputs of all products that a token passes, all layers."""
    sides = sum(linear.inputs + linear.outputs for n in range(shape.num_layers) for linear in shape.linears_of(n))
    products = 3 if shape.gated_mlp else 2
    return sides + shape.num_expert_layers * shape.num_experts_per_token * products * (
        shape.hidden_size + shape.expert_size
    )


def _read_weights(shape: ModelShape, tokens: float) -> float:
    """Weights of the layers that a pass over that many tokens reads: of experts those that a token is sent to."""
    sent = min(1.0, tokens * shape.num_experts_per_token / shape.num_experts) if shape.num_experts else 0.0
    return shape.num_linear_parameters + shape.num_router_parameters + sent * shape.num_expert_parameters


def product_rows(shape: ModelShape, tokens: float) -> float:
    """Rows of a product, on average by their arithmetic (harmonic): an expert's are those of the tokens sent to it."""
    if not shape.num_experts:
        return tokens
    share = shape.active_part(shape.num_expert_parameters) / shape.num_product_weights
    return tokens / (1 - share + share * shape.num_experts / shape.num_experts_per_token)


def expert_operations(device: DeviceCapability, shape: ModelShape, tokens: float) -> float:
    """Kernels that a pass over that many tokens starts beside a dense model's, to route them and in their experts.

    transformers sorts tokens by expert and multiplies all of them in one grouped product, where the GPU has one
    (compute capability 8.0); elsewhere each expert has its own products.
    """
    products = 0.0
    if device.kind != "cuda" or (device.compute_capability or (0, 0)) < (8, 0):
        products = (3 if shape.gated_mlp else 2) * min(shape.num_experts, tokens * shape.num_experts_per_token)
    return shape.num_expert_layers * (_ROUTING_OPERATIONS + products)


def score_bytes(shape: ModelShape, techniques: Techniques, attended: float) -> float:
    """Bytes a token's scores pass through memory in all layers, forward and backward; only eager attention has them."""
    if techniques.attn_implementation != "eager":
        return 0.0
    return _SCORE_BYTES[BYTES_PER_ELEMENT[techniques.dtype]] * shape.num_heads * shape.num_layers * attended


def other_bytes(workload: Workload, techniques: Techniques) -> float:
    """Bytes a token passes through memory for the loss and on the way to its experts, forward and backward."""
    shape = workload.shape
    logits = _LOGIT_BYTES * shape.output_rows * workload.supervised_fraction
    g = BYTES_PER_ELEMENT[techniques.dtype]
    return logits + _ROUTED_BYTES * g * shape.num_experts_per_token * shape.hidden_size * shape.num_expert_layers


def attention_rate(device: DeviceCapability, techniques: Techniques, products_rate: float, attended: float) -> float:
    """FLOP/s of attention where each token looks at that many on average."""
    limit = _FLASH_ON_HOPPER if (device.compute_capability or (0, 0))[0] in (9, 10) else _FLASH
    if techniques.attn_implementation != "flash_attention_2":
        limit = min(limit, _OTHER_ATTENTION)
    return products_rate * limit * attended / (attended + _HALF_RATE_LENGTH)


def has_large_cache(device: DeviceCapability) -> bool:
    """Whether the L2 cache holds what other cards fetch again: Ada and Blackwell GeForce, 24 to 128 MB.

    72 MB on an RTX 4090 (NVIDIA's Ada whitepaper), 6 MB on its predecessor.
    """
    return device.compute_capability in ((8, 9), (12, 0))


def memory_share(device: DeviceCapability) -> float:
    """Of element-wise traffic, the part that passes through memory."""
    return _LARGE_CACHE_SHARE if has_large_cache(device) else 1.0
