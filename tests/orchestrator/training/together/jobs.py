"""Jobs over one small model, each trained by the loop alone, or several of them over one base."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from orchestrator.data.dataset import Dataset
from orchestrator.data.order import Order
from orchestrator.runs.events import Event, StepReport
from orchestrator.training.loop import train
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.state import Hooks, Progress, Schedule, Training
from strategies import METHODS
from strategies.multi_lora.joint_model import BaseCopies, JointModel
from strategies.multi_lora.passes import JointRow
from strategies.multi_lora.turns import Turn, take_turns
from strategies.step import document_attention
from strategies.step.state import gather, restore
from strategies.techniques import checkpointing
from strategies.train_setup import TrainSettings, TrainSetup, TrainState
from strategies.workload import Techniques

PACKED = Techniques("float32", "document", True, False, 8, 64, optim="adamw_torch")


@dataclass(frozen=True)
class SmallJob:
    """What one job is trained with."""

    name: str
    options: dict[str, Any] = field(default_factory=lambda: {"lora_r": 4})
    learning_rate: float = 1e-2
    batch_size: int = 8
    techniques: Techniques = PACKED
    max_grad_norm: float = 1.0
    lr_factor: Callable[[int], float] = lambda step: 1.0
    seed: int = 3
    steps: int = 20
    first_row: int = 0
    method: str = "lora"
    loaded_with: dict[str, Any] = field(default_factory=dict)  # arguments of from_pretrained
    patience: int | None = None
    spoil: Callable[[int, TrainSetup], None] = lambda step, setup: None  # called before the first step and after each


@dataclass
class Trained:
    """What came of a job."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    saved: dict[int, tuple[TrainState, dict[str, Any]]] = field(default_factory=dict)
    progress: Progress | None = None
    setup: TrainSetup | None = None
    own_s: float = 0.0  # of the clock, in a row with others


def load(folder, **arguments):
    document_attention.register()
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="document", **arguments
    )


def set_up(model, job: SmallJob) -> TrainSetup:
    settings = TrainSettings(job.learning_rate, 0.01, job.techniques.optim, 0.9, 0.999, 1e-8, job.techniques, job.seed)
    setup = METHODS[job.method](**job.options).setup(model, settings)
    if job.techniques.gradient_checkpointing:
        checkpointing.enable(setup.model)
    return setup


def run(setup: TrainSetup, data_folder, job: SmallJob, start=None, stop_at: int | None = None) -> Trained:
    """The loop, from a checkpoint where there is one, to the end or to `stop_at`."""
    found, whole, progress = Trained(setup=setup), Dataset.load(data_folder), Progress()
    rows = [(job.first_row + row) % len(whole) for row in range(len(whole) - job.first_row % 5)]
    job.spoil(0, setup)
    if start:
        state, values = start
        restore(setup, state)
        progress = Progress.from_dict(values)

    def record(event: Event) -> None:
        if isinstance(event, StepReport):
            found.losses.append(event.loss)
            found.norms.append(event.grad_norm)
            job.spoil(event.step, setup)

    def save(now: Progress) -> str:
        held = gather(setup)
        assert held is not None
        copies = TrainState(
            {name: value.clone() for name, value in held.weights.items()},
            {name: {key: value.clone() for key, value in own.items()} for name, own in held.moments.items()},
        )
        found.saved[now.step] = copies, now.as_dict()
        return f"step-{now.step:08d}"

    def stop() -> str | None:
        return "asked" if stop_at is not None and progress.step + 1 >= stop_at else None

    schedule = Schedule(job.lr_factor, job.max_grad_norm, job.seed, 7, 3 if job.patience else None, job.patience)
    held_out = whole.select(range(4)) if job.patience else None
    order = Order(len(rows), job.batch_size, job.seed, 1, job.steps)
    training = Training(
        setup, whole.select(rows), held_out, order, schedule, job.techniques, ProcessGroup(), progress,
        Hooks(record, save, stop),
    )  # fmt: skip
    found.progress = train(training)
    found.weights = {name: p.detach().clone() for name, p in setup.parameters.items()}
    return found


def alone(model_folder, data_folder, job: SmallJob, prepare=None) -> Trained:
    """The job by itself; `prepare` is called with its base model."""
    model = load(model_folder, **job.loaded_with)
    setup = set_up(model, job)
    if prepare:
        prepare(model)
    return run(setup, data_folder, job)


def together(model, data_folder, jobs, starts=None, places=99, prepare=None, watch=None) -> dict[str, Any]:
    """All jobs over one model that was loaded; what each came to, or its error, and the `notes`.

    `prepare` is called with the model in which rows meet, `watch` before each pass with the jobs that wait.
    """
    base, notes, found = BaseCopies(model), [], {}
    row = JointRow(JointModel(base), notes.append)
    if prepare:
        prepare(row.model.model)

    def call_of(job: SmallJob):
        def call(turn: Turn) -> None:
            setup = set_up(base.copy(), job)
            passes, why = row.join(job.name, setup, turn)
            assert why is None, why
            setup.passes, began = passes, time.perf_counter()
            try:
                found[job.name] = run(setup, data_folder, job, (starts or {}).get(job.name))
                found[job.name].own_s = time.perf_counter() - began - passes.others_s
            finally:
                passes.leave()

        return call

    def one_pass() -> None:
        if watch:
            watch([backlog.job.job for backlog in row.backlogs])
        row.run_pass()

    turns = take_turns([call_of(job) for job in jobs], places, one_pass)
    for job, turn in zip(jobs, turns, strict=True):
        if turn.error is not None:
            found[job.name] = turn.error
    found["notes"] = notes
    return found


def farthest(first: Trained, second: Trained) -> float:
    """The largest relative difference of a step's loss, or of all weights in the end, or a tenth of a gradient norm's.

    A norm shows what rounding made of the weights several times larger: 2e-5 in single steps where losses differ by
    2e-6 (an EPYC with AVX512).
    """
    assert len(first.losses) == len(second.losses) > 0
    assert first.weights.keys() == second.weights.keys()
    losses, norms = (zip(*both, strict=True) for both in ((first.losses, second.losses), (first.norms, second.norms)))
    apart = [abs(a - b) / abs(b) for a, b in losses] + [abs(a - b) / abs(b) / 10 for a, b in norms]
    ours, theirs = (torch.cat([one.weights[name].flatten() for name in second.weights]) for one in (first, second))
    return max(*apart, ((ours - theirs).norm() / theirs.norm()).item())


def differing(job: SmallJob, **changes) -> SmallJob:
    return dataclasses.replace(job, **changes)
