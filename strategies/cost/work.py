"""What a method computes, as far as time depends on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """What is looked at and computed once, before the first step, by every worker."""

    rows: int  # of the training data, forward
    times: int  # so often
    held_bytes: float  # meanwhile, where the optimizer's state will be
    flops: float  # beside the passes, in fp32


@dataclass(frozen=True)
class Work:
    """What a method computes beside the forward pass: all that time needs to know about it."""

    trains_weights: bool  # the linear maps' own weight gradients
    trains_output: bool = False
    adapter_parameters: int = 0  # low-rank corrections: forward, input gradient, weight gradient
    full_parameters: int = 0  # of maps whose own weight gradients are computed where trains_weights is false
    adapter_inputs: int = 0  # sum of the widths of the inputs they read and outputs they add to, one layer
    adapter_bytes: float | None = None  # read and written for each of these numbers a token; None = as PEFT casts
    adapter_operations: int = 7  # kernels started for an adapter's forward pass
    dropped_inputs: int = 0  # of these widths, those that pass through dropout first
    num_adapters: int = 0  # a layer
    mlp_copies: int = 1  # of each token that pass between the MLP's maps
    routed: int = 0  # of a token, numbers that are copied or added on its way to experts and back, forward and backward
    num_trainable: int = 0
    num_tensors: int = 0
    orthogonal_products: float = 0.0  # FLOP of making every trained matrix of the layers orthogonal, once
    first_layer: int = 0  # below it nothing runs backward
    lower_passes: float = 1.0  # of all samples, those that pass the layers below it: of others the result is kept
    kept_bytes_per_token: float = 0.0  # of such a result
    cast_parameters: int = 0  # weights cast to the compute precision in each micro-batch
    dequantised_parameters: int = 0  # weights expanded to the compute precision in each pass
    dequantise_bytes_per_parameter: float = 0.0  # read, expanded, read again
    dequantise_operations: int = 0  # kernels started for a layer's weights in each pass
    reference_passes: int = 0  # forward passes of each sample beside the step's own, without gradients

    def forward_share(self, num_layers: int) -> float:
        """Of all layers, those that an average sample passes forward, those of the reference included."""
        return 1 - (1 - self.lower_passes) * self.first_layer / num_layers + self.reference_passes
