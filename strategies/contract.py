"""The contract between a training method and everything that plans or runs it.

A method is a frozen dataclass whose fields are its options, with two promises: `estimate` (pure arithmetic, no torch)
and `setup` (in a worker, with torch).  The training loop knows a method only through the `TrainSetup` it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from clusters.capability import DeviceCapability, NodeCapability
from strategies.model.architecture import Architecture
from strategies.quality import QualityPrior
from strategies.shape import ModelShape

if TYPE_CHECKING:  # torch is for workers; planning must not load it
    import torch

Dtype = Literal["float32", "bfloat16", "float16"]
LossType = Literal["nll", "chunked_nll"]
Quantization = Literal["nf4", "int8"]
Offload = Literal["none", "optimizer", "parameters", "activations", "weights"]
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
    fullest_step_tokens: int | None = None  # of the longest samples a step can draw; None = all the longest
    share: float = 1.0  # of each step's samples that one device does
    clips: bool = True  # gradients are clipped: no weight moves before all of them are there

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
    offload: Offload = "none"
    zero_stage: int = 0
    num_shards: int = 1  # devices that share what zero_stage shards
    state_share: float | None = None  # ZeRO-1 by memory: this device's part of the optimizer's state

    @property
    def uses_engine(self) -> bool:
        """Whether DeepSpeed takes over gradients and update."""
        return self.offloads_optimizer or (self.zero_stage > 0 and self.state_share is None)

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
        return self.optim.startswith("adamw_bnb")

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


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device at the peak of a training step, by part, and how far off that may be.

    `framework_bytes` is what the process holds beside tensors (CUDA context, libraries, allocator gaps); `host_bytes`
    is memory of the node, not of the device.
    """

    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    activations_bytes: float
    logits_bytes: float
    buffers_bytes: float = 0.0
    framework_bytes: float = 0.0
    host_bytes: float = 0.0
    low_bytes: float = 0.0
    high_bytes: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """Bytes on the device by part, in the order they are drawn."""
        names = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "framework")
        return {name: getattr(self, f"{name}_bytes") for name in names}

    @property
    def tensors_bytes(self) -> float:
        """What the tensors take: everything but `framework_bytes`."""
        return self.total_bytes - self.framework_bytes

    @cached_property
    def total_bytes(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of one optimizer step on one device, by what is waited for.

    `is_guess` says that a figure of the device was unknown and a typical one stood in for it.
    """

    compute_s: float  # matrix products and attention
    memory_s: float  # element-wise work: waits for memory, not for arithmetic
    overhead_s: float  # launching operations, dequantising, per micro-batch
    update_s: float  # the optimizer
    transfer_s: float = 0.0  # over the bus: offload
    sync_s: float = 0.0  # over the network
    is_guess: bool = False

    @property
    def parts(self) -> dict[str, float]:
        names = ("compute", "memory", "overhead", "update", "transfer", "sync")
        return {name: getattr(self, f"{name}_s") for name in names}

    @cached_property
    def step_s(self) -> float:
        return self.compute_s + self.memory_s + self.overhead_s + self.update_s + self.transfer_s + self.sync_s


@dataclass(frozen=True)
class StrategyPlan:
    """One method with its techniques on one device, and what that costs.  It does not judge."""

    method: str
    techniques: Techniques
    memory: MemoryEstimate
    time: TimeEstimate
    num_trainable_parameters: int
    flops_per_token: float
    checkpoint_bytes: float  # one checkpoint: trained weights and optimizer state
    gradient_bytes: float = 0.0  # what workers add up once a step
    gathered_bytes: float = 0.0  # weights that ZeRO-3 collects for each pass of a micro-batch
    streamed_bytes: float = 0.0  # frozen weights that cross the bus in each micro-batch
    num_micro_batches: int = 1  # a step, on this device
    tokens_per_micro_batch: float = 0.0  # padding included
    resolved: Mapping[str, tuple[Any, str]] = field(default_factory=dict)  # of `auto` options: value here, reason


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
    start_remote: Callable[..., Any] | None = None  # (node, class, *arguments) -> a remote object of that class there


@dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds of a training, whole and on the CPU."""

    weights: dict[str, torch.Tensor]  # trained weights and buffers by name
    moments: dict[str, dict[str, torch.Tensor]]  # the optimizer's tensors by weight and by their own name


class Sharding(Protocol):
    """Workers that keep parts of the optimizer's state, or of more: every call is made by all of them together."""

    def gather(self) -> TrainState | None:
        """The whole state on the first worker, None on the others."""
        ...

    def restore(self, state: TrainState) -> None:
        """Take this worker's part of a whole state; without moments only the weights."""

    def forget(self) -> None:
        """The optimizer as if it had made no step."""


class Engine(Protocol):
    """A library that takes over backward pass, sum of gradients and update; all workers run equally many passes."""

    model: torch.nn.Module  # what a training pass must go through

    def backward(self, loss: torch.Tensor) -> None:
        """Add a loss's gradients to those of the step; what workers add is summed."""

    def update(self, max_grad_norm: float) -> torch.Tensor:
        """Clip (0 = never), move the weights, forget the gradients; the norm before clipping."""
        ...


class Learner(Protocol):
    """Something that has to see gradients before some steps: of the step's first samples, the same on every worker."""

    rows: int  # samples whose gradients it learns from

    def is_due(self, step: int) -> bool:
        """Whether it learns before this step: `begin_learning`, passes and `next_learning`s, `end_learning`."""
        ...

    def begin_learning(self, num_passes: int) -> None:
        """The next backward passes move nothing."""

    def next_learning(self) -> None: ...

    def end_learning(self) -> dict[str, Any]:
        """What was learnt, for the run's record, with a sentence `text`; no gradient is left behind."""
        ...


class Streaming(Protocol):
    """An optimizer that works beside the computation: gradients leave layer by layer, weights move in their own time.

    It takes each gradient as the backward pass makes it; what workers have to add up hangs on `summed` instead.
    """

    summed: Sequence[torch.nn.Parameter]

    def last_pass(self, max_grad_norm: float) -> None:
        """The next backward pass is the step's last, and no other worker's gradients are to be added."""

    def update(self, max_grad_norm: float) -> torch.Tensor:
        """End the step (0 = never clip); the norm before clipping.  Raises FloatingPointError."""
        ...

    def settle(self) -> None:
        """Until every weight has moved.  Raises FloatingPointError."""

    def collect(self) -> None:
        """Settle, and have all that a checkpoint needs in the optimizer's `state`."""

    def home(self, parameter: torch.nn.Parameter, key: str) -> torch.device:
        """Where it keeps a part of a weight's state: what a checkpoint brings back belongs there at once."""
        ...

    def report(self) -> dict[str, Any]:
        """Bytes and seconds since the last report."""
        ...

    def spans(self) -> list[tuple[str, int, float, float]]:
        """What its lanes did since they were last asked: lane, layer, start and end in time.perf_counter's seconds."""
        ...

    def emulate_bus(self, bytes_per_s: float) -> None:
        """On a machine without a bus, let copies take as long as they would on one.  Raises ValueError elsewhere."""


@dataclass
class TrainSetup:
    """A model ready to train: all that the loop may know about a method."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    parameters: dict[str, torch.nn.Parameter]  # the trained ones, by name: what a checkpoint must hold
    export: Callable[[Path, Mapping[str, torch.Tensor] | None], None]  # writes what the run hands back; trained
    # weights are given where no worker holds them whole
    export_name: str  # "adapter" or "model": the folder of the run that receives it
    sharding: Sharding | None = None
    engine: Engine | None = None
    streaming: Streaming | None = None
    learner: Learner | None = None
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)  # not trained, but a checkpoint must hold them too
    notes: tuple[str, ...] = ()  # what the user should know of how the model was set up

    @property
    def device(self) -> torch.device:
        """Where what is trained lies."""
        return next(iter(self.parameters.values())).device

    def release(self) -> None:
        """Let go of model, optimizer and all that belongs to them: what was trained must be exported by then."""
        nothing: Any = None
        self.model = self.optimizer = self.export = nothing
        self.sharding = self.engine = self.streaming = self.learner = None
        self.parameters, self.buffers = {}, {}

    @property
    def summed(self) -> list[torch.nn.Parameter]:
        """Whose gradients workers add up and the update clips."""
        return list(self.streaming.summed if self.streaming else self.parameters.values())


def option(default: Any, doc: str, tried: tuple[Any, ...] = (), **limits: Any) -> Any:
    """A method's field, with the sentence and limits of the job file's schema; an open one is `tried` in a search."""
    return field(default=default, metadata={"doc": doc, "tried": tried, **limits})


class MethodDefaults(Protocol):
    """What holds for a method that does not say otherwise: methods inherit this and state what differs."""

    is_quantised: ClassVar[bool] = False  # the frozen weights lie in bitsandbytes' 4 or 8 bits
    keeps_base_frozen: ClassVar[bool] = False  # no weight of the base's layers moves: they may stream from the host
    streams: ClassVar[bool] = False  # its optimizer is a `Streaming`: weights move in their own time

    @property
    def layers_are_alike(self) -> bool:
        """Whether the same trains in every decoder layer."""
        return True

    @property
    def adapter_rank(self) -> int | None:
        """The rank of the low-rank adapter it trains; None where it trains none."""
        return None

    @property
    def adapter_folder(self) -> str | None:
        """The adapter that training starts from; None where it starts anew."""
        return None

    def refuses(self, techniques: Techniques, shape: ModelShape) -> str | None:
        """Why it cannot train this model with these techniques; None where it can."""
        return None

    def find_misfits(self, architecture: Architecture) -> list[str]:
        """Options that name modules or layers which the model does not have, a sentence each."""
        return []

    def quality_prior(self) -> QualityPrior | None:
        """What published runs found, on one model and task; None where nothing comparable was published."""
        return None

    def load_dtype(self, techniques: Techniques) -> Dtype:
        """The precision in which the model's weights are loaded before `setup`."""
        return techniques.dtype

    def load_arguments(self, techniques: Techniques) -> dict[str, Any]:
        """More arguments for transformers' `from_pretrained`."""
        return {}


@runtime_checkable
class Method(MethodDefaults, Protocol):
    """A training method: what each has to say for itself beside the defaults."""

    name: ClassVar[str]  # as the registry and the job file spell it
    full_rank: ClassVar[bool]  # whether it may change a weight beyond a low rank

    def estimate(
        self, workload: Workload, device: DeviceCapability, node: NodeCapability, techniques: Techniques
    ) -> StrategyPlan:
        """Predict memory and time of one device; pure, no torch."""
        ...

    def setup(self, model: Any, settings: TrainSettings) -> TrainSetup:
        """Turn a loaded transformers model into one that trains this way."""
        ...
