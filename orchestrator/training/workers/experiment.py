"""One combination of optimizations on a small part of the data: how fast it trains, what it takes, how good it gets.

The real set-up and the real loop, without checkpoints and export.  Plain PyTorch: a search runs it inside Ray Tune, a
benchmark in a row.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from orchestrator.data.dataset import Dataset
from orchestrator.data.order import Order
from orchestrator.data.samples import template_text
from orchestrator.errors import NothingFits
from orchestrator.job.job_file import Job
from orchestrator.planning.plan import NodePlan, Plan
from orchestrator.training.evaluate import evaluate_loss
from orchestrator.training.loop import Hooks, Progress, train
from orchestrator.training.model import hand_back, loading
from orchestrator.training.model.devices import card_in_use, device_like
from orchestrator.training.parallel import Group
from orchestrator.training.workers import preflight, quality, worker
from strategies.contract import Techniques, TrainSetup
from strategies.measure.trace import LiveStorages, tensors_of
from strategies.step import host_memory


class Experiment:
    """A planned combination, set up; `train_to` a step, as often as wanted, and read what it has come to."""

    def __init__(self, job: Job, plan: Plan, location: str, data: Dataset, held_out: Dataset) -> None:
        """Raises OrchestratorError where the combination cannot be set up."""
        self.job, self.plan, self.location, self.data, self.held_out = job, plan, location, data, held_out
        part = plan.nodes[0]
        self.device = device_like(part)
        self.card = card_in_use(part, self.device)  # name and UUID
        torch.set_num_threads(part.threads)
        self.setup, self.techniques = worker.prepare(job, plan, part, location, self.device, self._heard)
        self.tensors_bytes = tensors_peak_bytes(self.setup, data, self.techniques, plan.global_batch_size)
        train_section = job.spec.train
        self.order = Order(
            len(data), plan.global_batch_size, train_section.seed, train_section.num_train_epochs, plan.num_steps
        )
        self.schedule = worker.schedule_of(job, plan)
        self.progress = Progress()
        self._steps: list[tuple[float, int]] = []  # (seconds, tokens)
        self.curve: list[tuple[int, float]] = []  # (step, held-out loss)

    def train_to(self, step: int) -> float:
        """Train until `step` steps are done and measure the held-out loss.  Raises OrchestratorError."""

        def wish() -> str | None:  # asked in the middle of a step
            return "asked" if self.progress.step + 1 >= step else None

        self.progress.stopped = None
        hooks = Hooks(self._heard, lambda _: None, wish)
        with host_memory.kept() if self.device.type == "cpu" else contextlib.nullcontext():
            self.progress = train(
                self.setup, self.data, None, self.order, self.schedule, self.techniques, Group(), self.progress, hooks
            )
        loss = evaluate_loss(self.setup, self.held_out, self.techniques, Group())
        self.curve.append((self.progress.step, loss))
        return loss

    def quality(self) -> dict[str, float]:
        """Held-out loss and the metrics of generated answers."""
        tokenizer = loading.load_tokenizer(self.location, self.job, template_text(self.job))
        measured = quality.measure(self.job, self.plan, self.setup, tokenizer, self.held_out, self.techniques, Group())
        return {key: value for key, value in measured.items() if isinstance(value, float) and key != "seconds"}

    def times(self) -> dict[str, Any]:
        """Predicted beside measured, as a run's result.json has it, and the GPU that was measured.

        Ray gives any GPU of a node: on one of another name than the planned the prediction says nothing of it.
        """
        found = hand_back.step_times(self.plan, [seconds for seconds, _ in self._steps])
        return found | measured_on(self.plan.nodes[0], *self.card)

    @property
    def tokens_per_s(self) -> float | None:
        """Of the steady steps."""
        counted = hand_back.steady(self._steps)
        seconds = sum(seconds for seconds, _ in counted)
        return sum(tokens for _, tokens in counted) / seconds if seconds else None

    def _heard(self, event: str, **fields: Any) -> None:
        if event == "step":
            self._steps.append((fields["seconds"], fields["tokens"]))
        elif event == "note" and "out of memory" in fields["text"]:
            raise NothingFits(fields["text"])  # a leaner way is another combination


def measured_on(part: NodePlan, name: str, uuid: str | None) -> dict[str, Any]:
    """What the times of a part say of the device that ran it; no prediction where it is of another name."""
    if name == part.device:
        return {"uuid": uuid}
    return {"device": name, "uuid": uuid, "predicted_step_s": None, "formula_step_s": None}


def tensors_peak_bytes(setup: TrainSetup, data: Dataset, techniques: Techniques, num_samples: int) -> float:
    """Most bytes that tensors take in the heaviest step of `data`, weights and optimizer included; nothing moves."""
    device = next(iter(setup.parameters.values())).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        preflight.longest_batch(setup, data, techniques, num_samples)
        return float(torch.cuda.max_memory_allocated(device))
    live = LiveStorages()
    for tensor in tensors_of(setup):
        live.watch(tensor)
    with live:
        preflight.longest_batch(setup, data, techniques, num_samples)
    return float(live.take_peak())
