"""What a process that trains or measures works on: its job, its part of the plan, its device, its group."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from orchestrator.job.job_file import Job
from orchestrator.job.scoring.functions import FOLDER
from orchestrator.planning.plan import NodePlan, Plan
from orchestrator.runs.events import Event, Note, StepReport
from orchestrator.training.parallel import ProcessGroup
from strategies.contract import MemoryEstimate
from strategies.train_setup import TrainSetup
from strategies.workload import Techniques


@dataclass(frozen=True)
class HeaviestLoad:
    """What a preflight tries, as far as its end depends on it."""

    kind: Hashable  # what trains, how it is computed, where checkpoints are written
    tokens: int  # of the heaviest micro-batch
    supervised: int  # positions, of the one with most
    held_out_tokens: int  # of the longest row

    def covers(self, other: HeaviestLoad) -> bool:
        """Whether the other passes where this one did."""
        return (
            self.kind == other.kind
            and self.tokens >= other.tokens
            and self.supervised >= other.supervised
            and self.held_out_tokens >= other.held_out_tokens
        )


def tensors_kind(setup: TrainSetup, techniques: Techniques) -> Hashable:
    """Equal for trainings whose tensors have the same sizes in batches of the same size."""
    return tuple((name, weight.shape, weight.dtype) for name, weight in setup.parameters.items()), techniques


class RunSeat(Protocol):
    """A run's place among those that train over one base model in one process (training/together)."""

    @property
    def num_runs(self) -> int: ...

    @property
    def memory(self) -> MemoryEstimate:
        """Predicted of all that train at a time."""
        ...

    @property
    def num_workers(self) -> int:
        """Of this machine that train side by side."""
        ...

    @property
    def others_s(self) -> float:
        """Seconds so far in which other runs of this process were computed while it waited."""
        ...

    def copy_base(self, load: Callable[[], Any]) -> Any:
        """The base for this run alone, over tensors that all share; `load` where none has it yet."""
        ...

    def has_passed(self, load: HeaviestLoad) -> bool:
        """Whether another run of this process passed a preflight with as much."""
        ...

    def add_passed(self, load: HeaviestLoad) -> None:
        """Its own preflight went well."""
        ...

    def measure_once(self, key: Hashable, measure: Callable[[], float]) -> float:
        """What another run with this key has measured in this process, or `measure` now."""
        ...

    def joined(
        self, setup: TrainSetup, techniques: Techniques, note: Callable[[str], None]
    ) -> AbstractContextManager[None]:
        """Inside the block its passes are shared."""
        ...

    def attributed(self, report: StepReport) -> StepReport:
        """The report of a step with the time that is its own."""
        ...


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
    seat: RunSeat | None = None  # where other runs train over the same base model
    run_path: Path | None = None  # the folder of the run; None where there is none

    @property
    def is_first(self) -> bool:
        """Whether it is the worker that writes and records for all."""
        return self.group.rank == 0

    @property
    def metrics_folder(self) -> Path:
        """Where the modules of the job's own metrics lie: kept by the run, which all workers see."""
        kept = self.run_path / FOLDER if self.run_path else None
        return kept if kept and kept.is_dir() else self.job.folder

    def note(self, text: str) -> None:
        """Record a sentence for the user."""
        self.record(Note(text))
