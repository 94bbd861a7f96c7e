"""Short trainings of a few steps from the same weights, each in another layout: the loop of a run, and its numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from orchestrator.data.order import Order
from orchestrator.errors import NothingFits, RunFailed
from orchestrator.runs.events import Event, Note, StepReport
from orchestrator.training import checkpoint
from orchestrator.training.checkpoint import Checkpoint
from orchestrator.training.loop import train
from orchestrator.training.model.agreement import digest
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.proofs.sample import ProofSample
from orchestrator.training.shares import Shares
from orchestrator.training.state import Hooks, Progress, Training
from orchestrator.training.worker_context import WorkerContext
from orchestrator.training.workers import preflight
from orchestrator.training.workers.setup import Inputs, schedule_of
from strategies.step.state import forget, gather
from strategies.step.supervised_logits import inner_model
from strategies.workload import Techniques

_SMALL = 1e-2  # a loss or a norm below is compared as if it were this


@dataclass
class ShortTraining:
    """What a short training gave: of each step its loss and the norm of its gradient, and the weights at its end."""

    losses: dict[int, float] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)  # name -> digest
    short: str | None = None  # memory ran out, and micro-batches were no longer those of the layout


def difference(found: ShortTraining, expected: ShortTraining) -> float:
    """The largest of all steps' losses and gradient norms, relative."""
    numbers = [
        (ours[step], theirs[step])
        for ours, theirs in ((found.losses, expected.losses), (found.norms, expected.norms))
        for step in ours
    ]
    return max((abs(a - b) / max(abs(b), _SMALL) for a, b in numbers), default=float("nan"))


@dataclass(frozen=True)
class Team:
    """Who trains, and with which shares; None = equal ones."""

    group: ProcessGroup
    shares: Shares | None = None


class Trials:
    """Trainings of one worker by itself, or of all together where the model is divided among them."""

    def __init__(self, context: WorkerContext, inputs: Inputs, sample: ProofSample, folder: Path) -> None:
        self.context, self.setup, self.data, self.sample = context, inputs.setup, inputs.data, sample
        setup = inputs.setup
        self.is_divided = bool(setup.engine or setup.sharding or setup.passes) and context.group.size > 1
        self.group = context.group if self.is_divided else ProcessGroup()
        self._folder = folder / f"trials-{context.group.rank}"
        seed, steps = context.job.spec.train.seed, sample.num_steps
        self.order = Order(len(inputs.data), sample.rows_a_step, seed, 1.0, steps)
        if setup.engine:  # makes the states that are restored
            preflight.longest_batch(setup, inputs.data, inputs.techniques, sample.rows_a_step)
        self._start = self._save(Progress())

    def step_lengths(self) -> list[list[int]]:
        """Tokens of each step's rows."""
        return [self.data.lengths[self.order.sample_ids(step)].tolist() for step in range(self.sample.num_steps)]

    def train(self, techniques: Techniques, since: Path | None = None) -> ShortTraining:
        """Train from the first weights, leaving a checkpoint of half the steps, or from that to the end.  Collective.

        Raises NothingFits where the layout takes more memory than there is.
        """
        begin = self._start if since is None else self._read(since)
        return self._run(techniques, begin, _whole_rate, Team(self.group), saves=since is None)

    def step_at(self, weights: Path, techniques: Techniques, team: Team | None = None) -> ShortTraining:
        """Every step from the weights of a checkpoint, which do not move.  Collective in the team; raises as `train`.

        An optimizer divides gradients by their size: after a step of Adam's, what was rounding is as large as a rate.
        """
        begin = replace(self._read(weights), state=Progress().as_dict())
        return self._run(techniques, begin, _no_rate, team or Team(self.group))

    def _run(
        self,
        techniques: Techniques,
        begin: Checkpoint,
        lr_factor: Callable[[int], float],
        team: Team,
        saves: bool = False,
    ) -> ShortTraining:
        trial, middle = ShortTraining(), self.sample.num_steps // 2

        def record(event: Event) -> None:
            if isinstance(event, StepReport):
                trial.losses[event.step], trial.norms[event.step] = event.loss, event.grad_norm
            elif isinstance(event, Note) and "out of memory" in event.text:
                trial.short = event.text

        def save(progress: Progress) -> str | None:
            return self._save(progress).path.name if saves and progress.step == middle else None

        schedule = schedule_of(self.context.job, self.context.plan)
        schedule = replace(schedule, lr_factor=lr_factor, eval_steps=None, save_steps=middle)
        forget(self.setup)
        begin.restore(self.setup)
        progress, hooks = Progress.from_dict(begin.state), Hooks(record, save, lambda: None)
        with _attending(self.setup.model, techniques.attn_implementation):
            train(
                Training(
                    self.setup,
                    self.data,
                    None,
                    self.order,
                    schedule,
                    techniques,
                    team.group,
                    progress,
                    hooks,
                    team.shares,
                )
            )
        if short := next(filter(None, team.group.gather(trial.short)), None):
            raise NothingFits(short)
        trial.weights = {name: digest(weight) for name, weight in self.setup.parameters.items()}
        return trial

    def _read(self, path: Path) -> Checkpoint:
        notes: list[str] = []
        found = checkpoint.read(path, notes.append)
        if found is None:
            raise RunFailed("; ".join(notes))
        return found

    def _save(self, progress: Progress) -> Checkpoint:
        held = gather(self.setup)
        state = progress.as_dict() | {"step": progress.step}
        path = self._folder / f"step-{progress.step:08d}"
        if held is not None:
            path = checkpoint.save(self._folder, held, state)
        return Checkpoint(path, state)


def _whole_rate(step: int) -> float:
    return 1.0  # from the first step on: a warm-up would hardly move a weight


def _no_rate(step: int) -> float:
    return 0.0


@contextlib.contextmanager
def _attending(model: Any, attention: str) -> Iterator[None]:
    """Inside the block with another attention kernel."""
    inner = inner_model(model)
    before = inner.config._attn_implementation
    if attention != before:
        inner.set_attn_implementation(attention)
    try:
        yield
    finally:
        if attention != before:
            inner.set_attn_implementation(before)


@contextlib.contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """Inside the block nothing is dropped at random: what is drawn depends on which rows go through together."""
    kept: list[tuple[Any, str, float]] = []
    for module in model.modules():
        names = ("p",) if isinstance(module, torch.nn.Dropout) else ("attention_dropout", "dropout", "attn_pdrop")
        for name in names:
            if isinstance(rate := getattr(module, name, None), float) and rate > 0:
                kept.append((module, name, rate))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in kept:
            setattr(module, name, rate)
