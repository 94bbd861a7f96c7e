"""The contract between a training method and everything that plans or runs it.

A method is a frozen dataclass whose fields are its options, with three promises: `estimate` and `exports` (pure, no
torch) and `setup` (in a worker, with torch).  The training loop knows a method only by the `TrainSetup` it returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from clusters.capability import DeviceCapability, NodeCapability
from strategies.export import Export
from strategies.model.architecture import Architecture
from strategies.quality import QualityPrior
from strategies.shape import ModelShape
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import Dtype, Techniques, Workload


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
    disk_bytes: float = 0.0  # that are kept on the host's disk while it trains
    look_s: float = 0.0  # what the method looks at before the first step
    averaged_rank: int = 0  # of adapters whose products workers that train apart average; 0 = they average weights
    computed_part: float = 1.0  # of the rows' tokens: below 1 where what they begin with alike is computed once
    resolved: Mapping[str, tuple[Any, str]] = field(default_factory=dict)  # of `auto` options: value here, reason


def option(default: Any, doc: str, tried: tuple[Any, ...] = (), **limits: Any) -> Any:
    """A method's field, with the sentence and limits of the job file's schema; an open one is `tried` in a search."""
    return field(default=default, metadata={"doc": doc, "tried": tried, **limits})


class MethodDefaults(Protocol):
    """What holds for a method that does not say otherwise: methods inherit this and state what differs."""

    name: ClassVar[str]  # as the registry and the job file spell it
    is_quantised: ClassVar[bool] = False  # the frozen weights lie in bitsandbytes' 4 or 8 bits
    keeps_base_frozen: ClassVar[bool] = False  # no weight of the base's layers moves: they may stream from the host
    trains_score: ClassVar[bool] = False  # it trains the score of a model that has one in place of an output matrix
    streams: ClassVar[bool] = False  # its optimizer is a `Streaming`: weights move in their own time

    own_format: ClassVar[str | None] = None  # `peft_type` of what it hands back, where PEFT has none of that name

    is_proposed: ClassVar[bool] = True  # as a way out where a plan does not fit: its defaults mean something

    @property
    def layers_are_alike(self) -> bool:
        """Whether the same trains in every decoder layer."""
        return True

    @property
    def acts_between(self) -> bool:
        """Whether its setup has a `Between`."""
        return False

    @property
    def adds_loss(self) -> bool:
        """Whether its setup has an `ExtraLoss`: a loss beside that of the tokens."""
        return False

    @property
    def observes_held_out(self) -> bool:
        """Whether its setup has a `HeldOutObserver`: held-out rows pass the model before the first step."""
        return False

    @property
    def weighs_samples(self) -> bool:
        """Whether its setup has a `Weighing`: samples count unlike in the loss."""
        return False

    @property
    def has_dropout(self) -> bool:
        """Whether its training drops inputs at random."""
        return False

    @property
    def adapter_rank(self) -> int | None:
        """The rank of the low-rank adapter it trains; None where it trains none."""
        return None

    @property
    def adapter_folder(self) -> str | None:
        """The adapter that training starts from; None where it starts anew."""
        return None

    @property
    def starts_as_base(self) -> bool:
        """Whether the model with its adapter switched off is the one that training starts from."""
        return False

    def why_alone(self) -> str | None:
        """Why its jobs cannot share a base model with other jobs (multi_lora); None where they can."""
        return "its method trains weights of the base model itself"

    def why_one_worker(self) -> str | None:
        """Why several workers cannot train one model with it; None where they can."""
        return None

    def why_no_pairs(self) -> str | None:
        """Why what it trains is not pairs of A and B alone, over a base that stays; None where it is."""
        return f"{self.name} trains no low-rank adapter"

    def refuses(self, techniques: Techniques, shape: ModelShape) -> str | None:
        """Why it cannot train this model with these techniques; None where it can."""
        return None

    def trains_outside_layers(self, shape: ModelShape) -> bool:
        """Whether something of the embedding or of the output matrix trains."""
        return False

    def find_misfits(self, architecture: Architecture) -> list[str]:
        """Options that name modules or layers which the model does not have, a sentence each."""
        return []

    def quality_prior(self) -> QualityPrior | None:
        """What published runs found, on one model and task; None where nothing comparable was published."""
        return None

    @classmethod
    def load(cls, model: Any, folder: Path) -> Any:
        """Put what it handed back in its own format onto the base model.  Raises ValueError where that cannot be."""
        raise ValueError(f"{cls.name} has no format of its own: PEFT or transformers loads {folder}")

    def load_dtype(self, techniques: Techniques) -> Dtype:
        """The precision in which the model's weights are loaded before `setup`."""
        return techniques.dtype

    def load_arguments(self, techniques: Techniques) -> dict[str, Any]:
        """More arguments for transformers' `from_pretrained`."""
        return {}


@runtime_checkable
class Method(MethodDefaults, Protocol):
    """A training method: what each has to say for itself beside the defaults."""

    full_rank: ClassVar[bool]  # whether it may change a weight beyond a low rank

    def estimate(
        self, workload: Workload, device: DeviceCapability, node: NodeCapability, techniques: Techniques
    ) -> StrategyPlan:
        """Predict memory and time of one device; pure, no torch."""
        ...

    def exports(self, shape: ModelShape) -> Export:
        """What it hands back under these options of such a model, and which engines load that."""
        ...

    def setup(self, model: Any, settings: TrainSettings) -> TrainSetup:
        """Turn a loaded transformers model into one that trains this way."""
        ...
