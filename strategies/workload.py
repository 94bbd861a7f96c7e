"""What there is to compute, and with which switches: the sizes and choices that every cost and every worker reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from strategies.optimizers import OPTIMIZERS
from strategies.shape import ModelShape

Dtype = Literal["float32", "bfloat16", "float16"]
LossType = Literal["nll", "chunked_nll"]
Quantization = Literal["nf4", "int8"]
Offload = Literal["none", "optimizer", "parameters", "activations", "weights"]
Kept = Literal[False, True, "disk"]  # True: in the host's memory
Wire = Literal["float32", "bfloat16", "int8"]
LocalMerge = Literal["factors", "product", "reset"]
BYTES_PER_ELEMENT: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Workload:
    """What to compute, nothing about how: the model's sizes and the data's token counts."""

    shape: ModelShape
    num_samples: int
    num_tokens: int  # all tokens of one epoch, no padding
    num_supervised_tokens: int
    longest_sample: int  # tokens
    global_batch_size: int  # samples a step
    num_steps: int
    num_samples_seen: int  # over all epochs
    mean_square_length: float | None = None  # mean of length^2: what attention costs; None = as if all were equal
    padded_ratio: Mapping[int, float] = field(default_factory=dict)  # rows a micro-batch -> padded over real tokens
    tree_ratio: Mapping[int, float] = field(default_factory=dict)  # rows together -> their tokens over their tree's
    fullest_step_tokens: int | None = None  # of the longest samples a step can draw; None = all the longest
    share: float = 1.0  # of each step's samples that one device does
    clips: bool = True  # gradients are clipped: no weight moves before all of them are there
    needs_reference: bool = False  # log-probabilities under the base, beside those of the model that trains
    needs_divergence: bool = False  # both also of answers to other questions, without gradients

    @property
    def mean_length(self) -> float:
        return self.num_tokens / self.num_samples

    @property
    def attended_length(self) -> float:
        """Tokens that an average token looks at, twice: sum of length^2 over sum of length."""
        return (self.mean_square_length or self.mean_length**2) / self.mean_length

    @property
    def supervised_fraction(self) -> float:
        return self.num_supervised_tokens / self.num_tokens

    @property
    def tokens_per_step(self) -> float:
        """Real tokens of a step, all workers together."""
        return self.mean_length * self.num_samples_seen / self.num_steps


@dataclass(frozen=True)
class StagePart:
    """A device's part of a pipeline: decoder layers [first_layer, end_layer), and how hidden states travel."""

    index: int  # which stage of the pipeline, from 0
    count: int  # stages of the pipeline
    first_layer: int
    end_layer: int
    ahead: int = 0  # micro-batches that wait at each boundary beyond the fewest that keep all stages busy
    wire: Wire = "float32"  # form of hidden states and their gradients between stages

    @property
    def is_first(self) -> bool:
        """Whether it looks token ids up in the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the output matrix and computes the loss."""
        return self.index == self.count - 1

    @property
    def num_layers(self) -> int:
        return self.end_layer - self.first_layer

    def __str__(self) -> str:
        """Its layers, counted from 0."""
        last = self.end_layer - 1
        return f"layer {last}" if self.num_layers == 1 else f"layers {self.first_layer} to {last}"


@dataclass(frozen=True)
class Techniques:
    """The switches beside the method, resolved: nothing here is `auto`."""

    dtype: Dtype
    attn_implementation: str
    packing: bool
    gradient_checkpointing: bool
    per_device_train_batch_size: int  # rows of a micro-batch; a packed row holds up to max_length tokens
    max_length: int  # tokens
    optim: str = "adamw_torch_fused"
    loss_type: LossType = "nll"
    torch_compile: bool = False
    liger_kernel: bool = False  # its kernels for norms, rotary positions and gated MLPs
    offload: Offload = "none"
    zero_stage: int = 0
    num_shards: int = 1  # devices that share what zero_stage shards
    state_share: float | None = None  # ZeRO-1 by memory: this device's part of the optimizer's state
    stage: StagePart | None = None  # of a pipeline; None = the whole model
    share_prefixes: bool = False  # what documents of a packed row begin with alike is computed once
    cache_frozen_activations: Kept = False  # what frozen lower layers make of a sample is kept from its first pass
    local_merge: LocalMerge = "factors"  # workers that train apart average A and B; their products; products, restarted

    @property
    def uses_engine(self) -> bool:
        """Whether DeepSpeed takes over gradients and update."""
        return self.offloads_optimizer or (self.zero_stage > 0 and self.state_share is None)

    @property
    def averages_products(self) -> bool:
        """Whether workers that train apart average corrections B A instead of A and B."""
        return self.local_merge != "factors"

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer, or the weights with it, lie in the host's memory."""
        return self.offload in ("optimizer", "parameters")

    @property
    def streams_weights(self) -> bool:
        """Whether frozen weights lie in the host's memory and visit the device layer by layer."""
        return self.offload == "weights"

    @property
    def has_eight_bit_optimizer(self) -> bool:
        return OPTIMIZERS[self.optim].has_eight_bit_state

    @property
    def state_part(self) -> float:
        """Of the optimizer's state, what this device keeps and updates."""
        if self.state_share is not None:
            return self.state_share
        return 1 / self.num_shards if self.zero_stage >= 1 else 1.0

    @property
    def micro_batch_tokens(self) -> int:
        """The most tokens that one forward pass sees."""
        return self.per_device_train_batch_size * self.max_length
