"""What a process that trains or measures works on: its job, its part of the plan, its device, its group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from orchestrator.job.job_file import Job
from orchestrator.planning.plan import NodePlan, Plan
from orchestrator.runs.events import Event, Note
from orchestrator.training.parallel import ProcessGroup


def ignore_event(event: Event) -> None:
    """In place of `RunFolder.record` where no run is recorded, or another worker records the same."""


@dataclass(frozen=True)
class WorkerContext:
    """One worker of a run, or a process that does as one: a benchmark, a trial, the baseline helper."""

    job: Job
    plan: Plan
    part: NodePlan  # of the plan: this worker's
    model_folder: str  # of the base model
    device: torch.device
    group: ProcessGroup = ProcessGroup()
    slot: int = 0  # which of its node's workers it is
    record: Callable[[Event], None] = ignore_event

    @property
    def is_first(self) -> bool:
        """Whether it is the worker that writes and records for all."""
        return self.group.rank == 0

    def note(self, text: str) -> None:
        """Record a sentence for the user."""
        self.record(Note(text))
