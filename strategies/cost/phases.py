"""Seconds of a job outside of its steps: start, trial batch, evaluation, generated answers, saving.  Pure arithmetic.

What no formula gives is a figure of one kind of machine, named here as what it is: `Phases.guesses` says which.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from clusters.units import format_s

if TYPE_CHECKING:  # what only shows the phases of a run loads no cost model
    from clusters.capability import DeviceCapability, NodeCapability
    from strategies.shape import ModelShape
    from strategies.workload import Techniques

# Measured on two cores of a shared x86 server, quick start (LOG.md "How long a job is"): Ray's processes, the worker's
# imports of torch, transformers and peft, the process group.
_START_S = 28.0
_GPU_START_S = 8.0  # CUDA's context and its first kernels; a guess
_DISK_BYTES_PER_S = 1e9  # reading and checking weights, writing checkpoints; a guess: an NVMe drive reads twice that
_TOKENS_PREPARED_PER_S = 4e5  # chat template, tokens, mask and digest of a row, one process
# Kernels that a decoding step starts in a layer, through transformers' generate: projections, norms, positions, cache.
_DECODE_OPERATIONS = 45
_CACHE_PASSES = 6  # appended to by copying, repeated for grouped heads, read: DynamicCache and repeat_kv, counted


@dataclass(frozen=True)
class Phases:
    """Seconds of a job by phase, predicted or measured."""

    preparation_s: float = 0.0  # of the data
    start_s: float = 0.0  # processes, imports, loading the weights
    preflight_s: float = 0.0
    evaluation_s: float = 0.0  # held-out losses and generated answers: before, meanwhile and after
    training_s: float = 0.0
    saving_s: float = 0.0  # checkpoints, and what is handed back
    guesses: tuple[str, ...] = ()  # phases that rest on a figure which was not measured on these machines

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by phase, in the order in which they come."""
        names = ("preparation", "start", "preflight", "evaluation", "training", "saving")
        return {name: getattr(self, f"{name}_s") for name in names}

    @property
    def total_s(self) -> float:
        return sum(self.parts.values())

    def with_preparation(self, seconds: float) -> Phases:
        """With what preparing the data took."""
        return replace(self, preparation_s=seconds, guesses=tuple(n for n in self.guesses if n != "preparation"))

    @property
    def text(self) -> str:
        """In one line: those that show, the longest first."""
        shown = sorted(self.parts.items(), key=lambda part: -part[1])
        words = [f"{name} {format_s(seconds)}" for name, seconds in shown if seconds >= 0.005 * self.total_s]
        return ", ".join(words)


def start_s(shape: ModelShape, device: DeviceCapability, weights_bytes: float) -> float:
    """Until the model is ready: processes and imports, and its 16-bit files read, placed and checked."""
    from strategies.cost import time

    files = 2.0 * shape.num_parameters
    moved = weights_bytes / time.bus_rate(device) if device.kind != "cpu" else 0.0
    return _START_S + (_GPU_START_S if device.kind != "cpu" else 0.0) + files / _DISK_BYTES_PER_S + moved


def preparation_s(num_tokens: float) -> float:
    """Tokenising and masking that many tokens."""
    return num_tokens / _TOKENS_PREPARED_PER_S


def saving_s(num_bytes: float) -> float:
    """Writing that many bytes, and reading them again to check them."""
    return 2 * num_bytes / _DISK_BYTES_PER_S


def forward_share(techniques: Techniques) -> float:
    """Of a training pass, what a forward pass takes: frozen weights pass once forward and once backward."""
    return 1 / (2 + techniques.gradient_checkpointing)


def decode_step_s(
    shape: ModelShape,
    device: DeviceCapability,
    node: NodeCapability,
    techniques: Techniques,
    cache_bytes: float,
    rows: int,
) -> float:
    """One token of each of so many answers, beside the keys and values of all tokens before.

    Weights are read once, the cache is copied to be longer by one, and every kernel is started anew.  On a GPU the
    larger of memory and starting shows, on a CPU both.
    """
    from strategies.cost import time
    from strategies.workload import BYTES_PER_ELEMENT

    rate, _ = time.product_rate(device, node, techniques.dtype)
    bandwidth, _ = time.memory_rate(device)
    weights = shape.num_product_weights + shape.has_output * shape.vocab_size * shape.hidden_size
    moved = BYTES_PER_ELEMENT[techniques.dtype] * weights + _CACHE_PASSES * cache_bytes
    computing = moved / bandwidth + 2.0 * rows * weights / rate
    starting = _DECODE_OPERATIONS * shape.num_layers * time.operation_s(device, techniques)
    return computing + starting if device.kind == "cpu" else max(computing, starting)
