"""What a training is started with, and what its steps change.

Schedule   when things happen
Progress   what a checkpoint holds beside tensors
Hooks      how the loop records, saves and is asked to stop
Training   all of them with the model, the data and the group: what every step works on
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from orchestrator.data.dataset import Dataset
from orchestrator.data.order import Order
from orchestrator.errors import Diverged, JobError, NothingFits
from orchestrator.runs.events import Event, Note
from orchestrator.training.feed import Feed
from orchestrator.training.local_steps import LocalSteps, ProductSteps
from orchestrator.training.memory import fallback
from orchestrator.training.parallel import GradientSum, ProcessGroup, holders_of
from orchestrator.training.repair import Updates
from orchestrator.training.shares import Shares
from strategies.pipeline.layer_randomness import LayerRandomness
from strategies.step.out_of_memory import release_cache
from strategies.step.step import Update
from strategies.techniques import checkpointing
from strategies.techniques.precision import gradient_scaler
from strategies.train_setup import TrainSetup
from strategies.workload import Dtype, Techniques


@dataclass(frozen=True)
class Schedule:
    """When things happen, and the numbers of the optimisation that are not the optimizer's own."""

    lr_factor: Callable[[int], float]  # learning rate of a step over the peak
    max_grad_norm: float  # 0 = never clip
    seed: int
    save_steps: int
    eval_steps: int | None
    early_stopping_patience: int | None

    def update(self, step: int) -> Update:
        """The numbers of a step's update."""
        return Update(self.lr_factor(step), self.max_grad_norm)

    def evaluates_after(self, step: int, is_last: bool) -> bool:
        return bool(self.eval_steps) and ((step + 1) % self.eval_steps == 0 or is_last)

    def saves_after(self, step: int, is_last: bool) -> bool:
        return (step + 1) % self.save_steps == 0 or is_last


@dataclass
class Progress:
    """What a checkpoint must hold beside tensors; also what the loop returns."""

    step: int = 0  # steps done
    tokens: int = 0
    supervised_tokens: int = 0
    computed_tokens: int = 0  # as many, or fewer where common beginnings are computed once
    best_loss: float | None = None
    best_checkpoint: str | None = None
    eval_losses: dict[str, float] = field(default_factory=dict)  # step -> held-out loss, in nats a token
    evaluations_without_gain: int = 0
    loss_scale: dict[str, Any] = field(default_factory=dict)
    stopped: str | None = None  # why it ended before the last step: "early", or one of STOP_REQUESTS
    before: dict[str, Any] | None = None  # quality before the first step

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Progress:
        """From a checkpoint's state; a run that stopped early has ended, one that was asked to stop continues."""
        progress = cls(**{name: state[name] for name in cls.__dataclass_fields__ if name in state})
        progress.computed_tokens = state.get("computed_tokens", progress.tokens)
        progress.stopped = "early" if progress.stopped == "early" else None
        return progress

    def count(self, num_tokens: int, num_supervised: int, num_computed: int) -> None:
        """Add a step's tokens; padding, which is computed as well, is none of them."""
        self.tokens += num_tokens
        self.supervised_tokens += num_supervised
        self.computed_tokens += min(num_tokens, num_computed)

    def add_eval_loss(self, eval_loss: float, patience: int | None) -> bool:
        """Note the held-out loss after this step; whether it is the lowest so far, which NaN never is."""
        self.eval_losses[str(self.step)] = eval_loss
        improved = math.isfinite(eval_loss) and (self.best_loss is None or eval_loss < self.best_loss)
        if improved:
            self.best_loss, self.evaluations_without_gain = eval_loss, 0
        else:
            self.evaluations_without_gain += 1
        if patience and self.evaluations_without_gain >= patience:
            self.stopped = "early"
        return improved


STOP_REQUESTS = ("asked", "replan")  # to save and end after this step; the first that any worker has counts


@dataclass(frozen=True)
class Hooks:
    """How the loop reaches the outside world."""

    record: Callable[[Event], None]
    save: Callable[[Progress], str | None]  # writes a checkpoint, returns its name; None where another worker does
    stop_request: Callable[[], str | None]  # one of STOP_REQUESTS

    def note(self, text: str) -> None:
        """Record a sentence for the user."""
        self.record(Note(text))


@dataclass
class Training:
    """One worker's training.  Every worker of the group makes one: that is a collective call.

    `techniques` are this worker's own, the shares those of all replicas, equal where not planned.  With
    `local_batch_size` workers train alone inside a step (local_steps.py).
    """

    setup: TrainSetup
    data: Dataset
    held_out: Dataset | None
    order: Order
    schedule: Schedule
    techniques: Techniques
    group: ProcessGroup
    progress: Progress
    hooks: Hooks
    planned_shares: Shares | None = None
    local_batch_size: int | None = None

    def __post_init__(self) -> None:
        setup, group = self.setup, self.group
        if setup.between and (setup.engine or setup.sharding or setup.streaming or self.local_batch_size):
            raise JobError(
                "method: it acts between gradients and update, on every worker with all of both. DeepSpeed, ZeRO,"
                " stages, an optimizer that streams and local steps have no such moment: set strategy.mode: ddp,"
                " strategy.offload: none and strategy.local_steps: null"
            )
        # Its passes are recorded one by one: the third since the start, as the first ones take longer.
        self.timeline_step = min(self.progress.step + 3, self.order.num_steps)
        self.device = setup.device
        self.shares = self.planned_shares or Shares([1.0 / group.num_replicas] * group.num_replicas)
        self.local = self._train_apart(self.local_batch_size) if self.local_batch_size else None
        # Where one worker computes in fp16 all scale their losses: what is summed must have one scale.
        any_fp16 = group.sum([self.techniques.dtype == "float16"])[0] > 0
        self._scaler_dtype: Dtype = "float16" if any_fp16 else self.techniques.dtype
        self._set_scaler(self.progress.loss_scale)
        self.progress.loss_scale = self.scaler.state_dict()
        self.random = LayerRandomness(setup.model)
        layout = self.techniques.packing, self.device, self.techniques.share_prefixes
        self.feed = Feed(self.data, *layout, setup.lower)
        self.updates = Updates(setup, group, self.local is not None, self.hooks.note)
        self.holders = holders_of(group, setup.parameters) if self.techniques.stage else None
        own = [] if setup.engine or (self.local and not self.local.sums_changes) else setup.summed
        self.gradients = GradientSum(group, own, self.updates.check, self.holders)

    def _train_apart(self, batch_size: int) -> LocalSteps:
        """How workers that train apart come together."""
        if not self.techniques.averages_products:
            return LocalSteps(self.setup, batch_size)
        restarts = str(self.schedule.seed) if self.techniques.local_merge == "reset" else None
        return ProductSteps(self.setup, batch_size, self.group, restarts)

    @property
    def bytes_sent(self) -> int:
        others = (self.setup.optimizer, self.setup.passes, self.local)  # that send by themselves
        return self.gradients.bytes_sent + sum(getattr(other, "bytes_sent", 0) for other in others)

    def _set_scaler(self, state: dict[str, Any]) -> None:
        self.scaler: torch.amp.GradScaler = gradient_scaler(self.device.type, self._scaler_dtype)
        if state:
            self.scaler.load_state_dict(state)

    def give_up_update(self) -> None:
        """Leave an update for which there was no memory: no worker waits for this one's part in it any more."""
        if self.setup.passes:
            self.setup.passes.leave_update()
        self.gradients.discard()
        self.setup.optimizer.zero_grad(set_to_none=True)
        release_cache()

    def repair_update(self, grad_norm: float = 0.0) -> float:
        """Give its result to the workers where the last update failed; returns the gradients' norm.  Collective."""
        scale, grad_norm = self.updates.repair(self.scaler.state_dict(), grad_norm)
        self.setup.optimizer.zero_grad(set_to_none=True)
        if scale is not None:
            self._set_scaler(scale)
        return grad_norm

    def overflow(self, step: int, sample_ids: list[int]) -> str | None:
        """Note the loss scale after an update; what happened where a gradient was not finite and nothing has moved.

        Raises Diverged where the loss as it is, unscaled, has no finite gradients either.
        """
        before, now = self.progress.loss_scale, self.scaler.state_dict()
        self.progress.loss_scale = now
        if not self.scaler.is_enabled() or now["scale"] >= before["scale"]:
            return None
        if before["scale"] <= 1.0:
            raise Diverged(step, sample_ids, has_loss=True)
        was, new = before["scale"], now["scale"]
        return f"step {step + 1}: a gradient left fp16's range at a loss scale of {was:g}, now {new:g}"

    def use_less_memory(self, error: str | None) -> None:
        """Switch this worker to the next way that takes less memory.  Raises NothingFits where there is none.

        Without an error another stage of its pipeline ran short: all its stages take smaller micro-batches, and where
        they cannot be smaller that stage alone finds another way.
        """
        less = fallback(self.techniques, int(self.data.lengths.max()))
        if error is None and (less is None or less.micro_batch_tokens == self.techniques.micro_batch_tokens):
            self.hooks.note("out of memory on another stage, which finds another way; the step is repeated")
            return
        error = error or "on another stage of the pipeline"
        if less is None:
            raise NothingFits(f"not even one sample at a time fits: {error}. Lower data.max_length, or add a device")
        if less.gradient_checkpointing and not self.techniques.gradient_checkpointing:
            checkpointing.enable(self.setup.model)
        self.setup.optimizer.zero_grad(set_to_none=True)
        release_cache()
        recomputed = ", activations computed again" if less.gradient_checkpointing else ""
        self.hooks.note(
            f"out of memory; the step is repeated with micro-batches of {less.per_device_train_batch_size} x"
            f" {less.max_length} tokens{recomputed} ({error})"
        )
        self.techniques = less

    def replicated(self) -> list[torch.Tensor]:
        """Trained weights, buffers and optimizer state, in an order that is the same on every worker."""
        parameters = self.setup.parameters.values()
        return [*self.setup.buffers.values(), *(tensor for p in parameters for tensor in self._with_state(p))]

    def _with_state(self, parameter: torch.nn.Parameter) -> list[torch.Tensor]:
        state = self.setup.optimizer.state.get(parameter, {})
        return [parameter, *(state[key] for key in sorted(state) if torch.is_tensor(state[key]))]

    def align(self) -> None:
        """Let all workers that hold the same weights continue with those of the first of them.  Collective."""
        if self.holders is not None:
            for one in self.holders:
                one.group.broadcast([tensor for p in one.parameters for tensor in self._with_state(p)], one.first)
        elif not self.setup.sharding:
            self.group.broadcast(self.replicated(), 0)
