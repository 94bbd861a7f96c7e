"""What a worker trains: all that the training loop may know about a method, and who takes over which part of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from strategies.export import ExportFormat, export_folder
from strategies.method_parts import ExtraLoss, HeldOutObserver, Learner, Weighing
from strategies.workload import LossType, Techniques

if TYPE_CHECKING:  # torch is for workers; planning must not load it
    import torch

T = TypeVar("T")


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
    num_samples: int = 0  # of the training data
    num_steps: int = 0  # of the whole run; 0 where none is planned
    warmup_steps: int = 0  # in which an optimizer that needs no schedule lets its own rate rise


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


@dataclass(frozen=True)
class StepPasses:
    """What the passes of one step need to know beside the samples of each."""

    num_counted: (
        int  # what the step's loss is a mean over, of all workers: supervised tokens, or an objective's samples
    )
    techniques: Techniques
    scaler: torch.amp.GradScaler
    take: Callable[[Sequence[int]], Any]  # the `Batch` of some samples, on the device
    begin: Callable[[Any], None]  # called before a batch's forward pass: its random numbers begin
    filler: list[int]  # a sample for a pass that counts for nothing
    before_last: Callable[[], None] = lambda: None  # called once, before the backward pass of the last micro-batch
    begin_layer: Callable[[int], None] = lambda layer: None  # the random numbers of a decoder layer begin


@dataclass
class PassTimes:
    """What a stage of a pipeline did in one step; seconds of time.perf_counter."""

    passes: list[tuple[bool, int, float, float]] = field(default_factory=list)  # is forward, micro-batch, begin, end
    waits: list[tuple[float, float]] = field(default_factory=list)  # for a neighbour's message, or for its own to leave
    bytes_sent: int = 0
    bytes_received: int = 0

    @property
    def busy_s(self) -> float:
        """It computes, packs and unpacks."""
        return sum(end - begin for *_, begin, end in self.passes)

    @property
    def wait_s(self) -> float:
        return sum(end - begin for begin, end in self.waits)


class Passes(Protocol):
    """How micro-batches go through the model.  Workers that share one copy of it make each call together.

    The default is `strategies.step.passes.SequentialPasses`.
    """

    @property
    def sends_back(self) -> bool:
        """Whether gradients go on to layers of another worker, below all of this one's."""
        ...

    def run(self, micro_batches: Sequence[list[int]], step: StepPasses) -> torch.Tensor:
        """Add the gradients of micro-batches, given by their samples; this worker's part of the step's loss."""
        ...

    def tell_order(self, follow: Callable[[bool, bool], None]) -> None:
        """Where a backward pass does not follow each forward pass, call `follow` before every pass of a step.

        With whether it is a forward pass, and whether the next one is.
        """

    def each(self, batches: Sequence[list[T]], call: Callable[[list[T]], None]) -> tuple[list[T], str | None]:
        """Call `call` with every batch; what did not fit in memory even alone, and why.

        A batch that runs out of memory on any of the workers is called again in halves by all of them, so a call must
        overwrite what one with the same first item left behind.
        """
        ...

    def loss_sum(self, batch: Any, techniques: Techniques) -> torch.Tensor:
        """Summed loss of a batch's supervised tokens or samples, without gradients; 0 where another worker has it."""
        ...

    def logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) of rows without padding, without gradients."""
        ...

    def generate(self, **arguments: Any) -> torch.Tensor:
        """Prompts with what the model adds to them; arguments of transformers' `generate`."""
        ...

    def gradient_norm(self) -> torch.Tensor:
        """The norm of all gradients of the update, those of other workers' layers included."""
        ...

    def end_together(self, reason: str | None) -> None:
        """Raises MemoryError on every worker that shares the model where one of them has a reason: no memory."""

    def leave_update(self) -> None:
        """Give up an update for lack of memory: nobody waits any more for this worker's part of the norm."""

    def spread_overflow(self) -> None:
        """Let a gradient of fp16's that is not finite anywhere be found here as well, before they are unscaled."""

    def times(self) -> PassTimes | None:
        """When the last `run` computed and waited; None where it waits for no other worker's passes."""
        ...


class Between(Protocol):
    """What a method does between passes and after updates: every worker calls it, with equal inputs.

    It may be collective, and may change weights, buffers and the optimizer's state.  What it keeps from step to step
    lies in the setup's `buffers`, or a checkpoint would not hold it.  Steps count from 0; each is seen once, whether it
    was repeated for lack of memory or for an overflow, or the run was resumed before it.  What runs it not on every
    worker with whole gradients and moments is refused (`compatibility.py`): `MethodDefaults.acts_between` says so.
    """

    def gradients_ready(self, step: int) -> None:
        """The gradients of all workers are summed, free of fp16's scale and finite, and not yet clipped."""

    def step_done(self, step: int) -> dict[str, Any] | None:
        """The weights have moved; what it did, for the run's record, with a sentence `text`, or None."""
        ...


class Engine(Protocol):
    """A library that takes over backward pass, sum of gradients and update; all workers run equally many passes."""

    model: torch.nn.Module  # what a training pass must go through

    def backward(self, loss: torch.Tensor) -> None:
        """Add a loss's gradients to those of the step; what workers add is summed."""

    def update(self, max_grad_norm: float) -> torch.Tensor:
        """Clip (0 = never), move the weights, forget the gradients; the norm before clipping."""
        ...


class Streaming(Protocol):
    """An optimizer that works beside the computation: gradients leave layer by layer, weights move in their own time.

    It takes each gradient as the backward pass makes it; what workers have to add up hangs on `summed` instead.
    """

    summed: Sequence[torch.nn.Parameter]
    device: torch.device  # where the model computes

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


class SampleLoss(Protocol):
    """A loss over whole documents instead of supervised tokens: an objective's (strategies/objectives)."""

    num_totals: int  # numbers that `take` returns

    @property
    def needs_reference(self) -> bool: ...

    @property
    def needs_divergence(self) -> bool:
        """Whether `begin` must be told how far the model has moved from the reference."""
        ...

    def begin(self, num_samples: int, num_tokens: int, divergence: float = 0.0) -> None:
        """A step or an evaluation begins: its samples, the tokens of its likelihood term, how far the model moved."""

    def loss_sum(self, model: Any, batch: Any, loss_type: LossType) -> torch.Tensor:
        """Summed loss of a batch's samples."""
        ...

    def answer_logps(self, model: Any, batch: Any, loss_type: LossType) -> torch.Tensor:
        """log p of each document's answer by the model as it is, without gradients and dropout."""
        ...

    def reference_logps(self, model: Any, batch: Any, loss_type: LossType) -> torch.Tensor:
        """The same of the reference: as they are known, or with the adapter off."""
        ...

    def take(self) -> list[float]:
        """Totals since it began or was last asked, to be added up over workers."""
        ...

    def metrics_of(self, totals: Sequence[float]) -> dict[str, float]:
        """What is told of a step or an evaluation by the totals of all workers."""
        ...


class InputNoise(Protocol):
    """Noise on what the layers read, in training passes alone."""

    def begin(self, step: int) -> None:
        """The next passes are of this step."""

    def over(self, batch: Any) -> AbstractContextManager[None]:
        """Inside the block the model computes this batch with its noise."""
        ...


class KnownLayers(Protocol):
    """Layers whose results for some samples are known already."""

    def serve(self, sample_ids: Sequence[int], parts: Any) -> AbstractContextManager[None]:
        """Inside the block the model computes a packed row of these samples, without what is known of them."""
        ...

    def expect(self, sample_ids: Sequence[int], parts: Any) -> None:
        """A packed row that is served soon: what is known of it may begin its way to the device."""
        ...

    def count(self) -> int:
        """Tokens that did not pass these layers since this was last asked."""
        ...


@dataclass(frozen=True)
class AdapterPair:
    """The trained correction of one linear map, dW_OI = scale B_OR A_RI, where that is all that trains of it."""

    name: str  # of the layer in the model
    layer: torch.nn.Module  # map and correction
    a_RI: torch.nn.Parameter
    b_OR: torch.nn.Parameter
    scale: float


class KeptCorrections(Protocol):
    """Corrections that no longer train, beside the pairs that do."""

    def add(self, parts: Mapping[str, Any]) -> tuple[float, float]:
        """Add `Factors` by layer: the squares of what was cut off for lack of room, and of all."""
        ...


@dataclass
class TrainSetup:
    """A model ready to train: all that the loop may know about a method."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    parameters: dict[str, torch.nn.Parameter]  # the trained ones, by name: what a checkpoint must hold
    export: Callable[[Path, Mapping[str, torch.Tensor] | None], None]  # writes what the run hands back; trained
    # weights are given where no worker holds them whole
    export_format: ExportFormat  # of what it writes: as the method's `exports` says
    sharding: Sharding | None = None
    engine: Engine | None = None
    streaming: Streaming | None = None
    learner: Learner | None = None
    held_out_observer: HeldOutObserver | None = None
    weighing: Weighing | None = None
    passes: Passes | None = None  # None = one after the other
    between: Between | None = None
    lower: KnownLayers | None = None  # frozen layers whose results are kept
    objective: SampleLoss | None = None  # None = the mean loss of supervised tokens
    noise: InputNoise | None = None  # on the embeddings of training passes
    extra_loss: ExtraLoss | None = None  # of training passes: `MethodDefaults.adds_loss` says so
    label_smoothing: float = 0.0  # of training passes: this part of each token's label is spread over the vocabulary
    row_multiple: int = 1  # tokens of which packed rows of training passes hold a multiple, filled up where they do not
    names: frozenset[str] = frozenset()  # of all that the run trains, wherever it lies; empty = all of it is here
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)  # not trained, but a checkpoint must hold them too
    decided: tuple[str, ...] = ()  # of the buffers, choices: when `between` has made one all workers take the first's,
    # since unlike devices round what is compared otherwise
    notes: tuple[str, ...] = ()  # what the user should know of how the model was set up
    pairs: tuple[AdapterPair, ...] = ()  # all that trains, where pairs are averaged or start again
    kept: KeptCorrections | None = None  # where pairs start again
    written: Callable[[], Mapping[str, torch.Tensor]] | None = None  # trained weights as `export` writes them, where
    # those are others than the parameters
    export_is_rounded: bool = False  # they are sums that training computes with unrounded
    settled_after: int = (
        0  # steps before the model is the one to be handed back: held-out losses until then choose none
    )

    @property
    def device(self) -> torch.device:
        """Where what is trained is computed; the model, where all that trains lies on other workers."""
        if self.streaming:
            return self.streaming.device
        return next(iter(self.parameters.values()), next(self.model.parameters())).device

    @property
    def export_folder(self) -> str:
        """The folder of the run that receives what it hands back."""
        return export_folder(self.export_format)

    def release(self) -> None:
        """Let go of model, optimizer and all that belongs to them: what was trained must be exported by then."""
        nothing: Any = None
        self.model = self.optimizer = self.export = nothing
        self.extra_loss = self.held_out_observer = None
        self.sharding = self.engine = self.streaming = self.learner = self.passes = self.between = self.weighing = None
        self.parameters, self.buffers, self.pairs, self.kept, self.written = {}, {}, (), None, None

    @property
    def all_names(self) -> frozenset[str]:
        """Names of every weight and buffer that a checkpoint of the run holds."""
        return self.names or frozenset(self.parameters.keys() | self.buffers.keys())

    @property
    def summed(self) -> list[torch.nn.Parameter]:
        """Whose gradients workers add up and the update clips."""
        return list(self.streaming.summed if self.streaming else self.parameters.values())
