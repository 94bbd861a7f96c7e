"""The nouns and the promises of the strategy layer.

A method is a frozen dataclass whose fields are its knobs, with two promises: `estimate` (pure arithmetic, no torch)
and `setup` (in a worker, with torch).  The training loop knows a method only through the `TrainSetup` it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from clusters.capability import DeviceCapability

if TYPE_CHECKING:  # torch is for workers; planning must not load it
    import torch

Dtype = Literal["float32", "bfloat16", "float16"]
BYTES_PER_ELEMENT: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only transformer that cost memory or time."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool
    gated_mlp: bool = True

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ModelShape:
        """Read a Hugging Face `config.json`; GPT-2's and OPT's older key names are understood."""
        config = {**config, **config.get("text_config", {})}
        hidden = _first(config, "hidden_size", "n_embd", "d_model")
        heads = _first(config, "num_attention_heads", "n_head")
        model_type = config.get("model_type", "")
        return cls(
            hidden_size=hidden,
            num_layers=_first(config, "num_hidden_layers", "n_layer"),
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            intermediate_size=_first(config, "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden),
            vocab_size=_first(config, "vocab_size"),
            tied_embeddings=config.get("tie_word_embeddings", True),
            gated_mlp=model_type not in ("gpt2", "opt", "gptj", "gpt_neox", "phi", "starcoder2"),
        )

    @property
    def linear_shapes(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of each linear map in one decoder layer."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        h, f = self.hidden_size, self.intermediate_size
        mlp = ((h, f), (h, f), (f, h)) if self.gated_mlp else ((h, f), (f, h))
        return ((h, q), (h, kv), (h, kv), (q, h), *mlp)

    @property
    def num_linear_parameters(self) -> int:
        return self.num_layers * sum(i * o for i, o in self.linear_shapes)

    @property
    def num_embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @property
    def num_parameters(self) -> int:
        return self.num_linear_parameters + self.num_embedding_parameters + (2 * self.num_layers + 1) * self.hidden_size


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

    @property
    def mean_length(self) -> float:
        return self.num_tokens / self.num_samples

    @property
    def tokens_per_step(self) -> float:
        return self.mean_length * self.num_samples_seen / self.num_steps


@dataclass(frozen=True)
class Techniques:
    """The switches beside the method, resolved: nothing here is `auto`."""

    dtype: Dtype
    attn_implementation: str
    packing: bool
    gradient_checkpointing: bool
    per_device_train_batch_size: int  # rows of a micro-batch; a packed row holds up to max_length tokens
    max_length: int  # tokens

    @property
    def micro_batch_tokens(self) -> int:
        """The most tokens that one forward pass sees."""
        return self.per_device_train_batch_size * self.max_length


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a training step, by part."""

    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    activations_bytes: float
    logits_bytes: float

    @property
    def total_bytes(self) -> float:
        parts = (self.weights_bytes, self.gradients_bytes, self.optimizer_bytes)
        return sum(parts) + self.activations_bytes + self.logits_bytes


@dataclass(frozen=True)
class StrategyPlan:
    """One method with its techniques on one device, and what that costs.  It does not judge."""

    method: str
    techniques: Techniques
    memory: MemoryEstimate
    num_trainable_parameters: int
    flops_per_token: float
    checkpoint_bytes: float  # one checkpoint: trained weights and optimizer state


@dataclass(frozen=True)
class TrainSettings:
    """What a method needs to know of the job to build its optimizer."""

    learning_rate: float
    weight_decay: float
    optim: str
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    techniques: Techniques
    seed: int


@dataclass
class TrainSetup:
    """A model ready to train: all that the loop may know about a method."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    parameters: dict[str, torch.nn.Parameter]  # the trained ones, by name: what a checkpoint must hold
    export: Callable[[Path], None]  # writes what the run hands back
    export_name: str  # "adapter" or "model": the folder of the run that receives it


@runtime_checkable
class Method(Protocol):
    """A way of training; see the module's docstring.  `load_dtype` is the word a loader needs before `setup`."""

    def estimate(self, workload: Workload, device: DeviceCapability, techniques: Techniques) -> StrategyPlan:
        """Predict memory and work; pure, no torch."""
        ...

    def load_dtype(self, techniques: Techniques) -> Dtype:
        """The precision in which the model's weights are to be loaded before `setup`."""
        ...

    def setup(self, model: Any, settings: TrainSettings) -> TrainSetup:
        """Turn a loaded transformers model into one that trains this way."""
        ...


def _first(config: dict[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        if config.get(name) is not None:
            return int(config[name])
    if default is None:
        raise KeyError(f"the model's config.json has none of {', '.join(names)}")
    return default
