"""Trains one combination of options on a small part of the data: its speed, its memory, its quality.

The set-up and the loop of a run, without checkpoints and export.  Plain PyTorch: a search runs it inside Ray Tune, a
benchmark in a row.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch

from orchestrator.data.dataset import Dataset
from orchestrator.data.order import Order
from orchestrator.data.samples import template_text
from orchestrator.errors import NothingFits
from orchestrator.job.job_file import Job
from orchestrator.planning.plan import NodePlan, Plan
from orchestrator.runs.events import Event, Note, StepReport
from orchestrator.training.evaluate import evaluate_loss
from orchestrator.training.loop import train
from orchestrator.training.model import loading
from orchestrator.training.model.devices import device_like, gpu_in_use
from orchestrator.training.model.references import attach_references
from orchestrator.training.state import Hooks, Progress, Training
from orchestrator.training.worker_context import RunSeat, WorkerContext, tensors_kind
from orchestrator.training.workers import preflight, quality, result
from orchestrator.training.workers.setup import prepare_model, schedule_of
from strategies.measure.trace import LiveStorages, tensors_of
from strategies.step import host_memory, thread_waits
from strategies.train_setup import TrainSetup
from strategies.workload import Techniques


class Experiment:
    """A planned combination, set up: `train_to` a step, as often as wanted, then read its figures.

    With a seat it shares the base model and passes with others in this process, until it is closed.
    """

    def __init__(
        self, job: Job, plan: Plan, model_folder: str, data: Dataset, held_out: Dataset, seat: RunSeat | None = None
    ) -> None:
        """Raises OrchestratorError where the combination cannot be set up."""
        self.plan, part, train_section = plan, plan.nodes[0], job.spec.train
        device = device_like(part)
        self._gpu = gpu_in_use(part, device)  # name and UUID
        thread_waits.use_threads(part.threads)
        self._context = WorkerContext(job, plan, part, model_folder, device, record=self._record, seat=seat)
        self._data, self._held_out = data, held_out
        self._setup, self._techniques = prepare_model(self._context, len(data))
        attach_references(self._context, self._setup, self._techniques, data, held_out)
        self.tensors_bytes = self._tensors_bytes()
        epochs = train_section.num_train_epochs
        self._order = Order(len(data), plan.global_batch_size, train_section.seed, epochs, plan.num_steps)
        self._schedule = schedule_of(job, plan)
        self.progress = Progress()
        self._steps: list[tuple[float, float]] = []  # (seconds, tokens)
        self.curve: list[tuple[int, float]] = []  # (step, held-out loss)
        self.notes: list[str] = []
        self._open = contextlib.ExitStack()
        if seat:
            self._open.enter_context(seat.joined(self._setup, self._techniques, self.notes.append))

    def close(self) -> None:
        """Leave the seat."""
        self._open.close()

    def _tensors_bytes(self) -> float:
        """The most that tensors take in a step; of one that shares its base, as measured of one whose tensors are of
        the same sizes."""
        batch, seat = self.plan.global_batch_size, self._context.seat
        measure = partial(
            tensors_peak_bytes, self._setup, self._data, self._techniques, batch, is_shared=seat is not None
        )
        if seat is None:
            return measure()
        return seat.measure_once((tensors_kind(self._setup, self._techniques), batch), measure)

    def train_to(self, step: int) -> float:
        """Train until `step` steps are done and measure the held-out loss.  Raises OrchestratorError."""

        def stop_request() -> str | None:  # called in the middle of a step
            return "asked" if self.progress.step + 1 >= step else None

        self.progress.stopped = None
        training = Training(
            self._setup,
            self._data,
            self._held_out,  # its plan evaluates at no step, but a method may look at them
            self._order,
            self._schedule,
            self._techniques,
            self._context.group,
            self.progress,
            Hooks(self._record, lambda _: None, stop_request),
        )
        keeps = self._context.device.type == "cpu" and not self._context.seat  # shared passes keep it themselves
        with host_memory.kept() if keeps else contextlib.nullcontext():
            self.progress = train(training)
        loss = evaluate_loss(self._setup, self._held_out, self._techniques, self._context.group)
        self.curve.append((self.progress.step, loss))
        return loss

    def quality(self) -> dict[str, float]:
        """Held-out loss and the metrics of generated answers."""
        context = self._context
        tokenizer = loading.load_tokenizer(context.model_folder, context.job, template_text(context.job))
        measured = quality.measure(context, self._setup, self._techniques, tokenizer, self._held_out)
        return {key: value for key, value in measured.items() if isinstance(value, float) and key != "seconds"}

    def times(self) -> dict[str, Any]:
        """Predicted beside measured, as a run's result.json has it, and the GPU that was measured.

        Ray gives any GPU of a node: for one of another name than the planned one there is no prediction.
        """
        found = result.step_times(self.plan, [seconds for seconds, _ in self._steps])
        return found | measured_on(self.plan.nodes[0], *self._gpu) | result.shared(self._context)

    @property
    def tokens_per_s(self) -> float | None:
        """Of the steady steps."""
        counted = result.skip_warm_up(self._steps)
        seconds = sum(seconds for seconds, _ in counted)
        return sum(tokens for _, tokens in counted) / seconds if seconds else None

    def _record(self, event: Event) -> None:
        if isinstance(event, StepReport):
            event = self._context.seat.attributed(event) if self._context.seat else event
            self._steps.append((event.seconds, event.tokens))
        elif isinstance(event, Note) and "out of memory" in event.text:
            raise NothingFits(event.text)  # a fallback in less memory is another combination


def measured_on(part: NodePlan, name: str, uuid: str | None) -> dict[str, Any]:
    """The device that ran a part, for its times; no prediction where its name is not the planned one's."""
    if name == part.device:
        return {"uuid": uuid}
    return {"device": name, "uuid": uuid, "predicted_step_s": None, "formula_step_s": None}


def tensors_peak_bytes(
    setup: TrainSetup, data: Dataset, techniques: Techniques, num_samples: int, is_shared: bool = False
) -> float:
    """Most bytes that tensors take in the heaviest step of `data`, weights and optimizer included; nothing moves.

    What others in this process hold on a GPU, as they wait for their turns, does not count.
    """
    if setup.device.type == "cuda":
        own = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(setup)}.values())
        others = max(0, torch.cuda.memory_allocated(setup.device) - own) if is_shared else 0
        torch.cuda.reset_peak_memory_stats(setup.device)
        preflight.longest_batch(setup, data, techniques, num_samples)
        return float(torch.cuda.max_memory_allocated(setup.device) - others)
    live = LiveStorages()
    for tensor in tensors_of(setup):
        live.watch(tensor)
    with live:
        preflight.longest_batch(setup, data, techniques, num_samples)
    return float(live.take_peak())
