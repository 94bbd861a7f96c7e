"""Trackers that write beside the run: TensorBoard's files, and Weights & Biases' without a network.

Each is written from the run's first event, so a resumed run has one whole record.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable
from itertools import groupby
from typing import Any, Protocol

from orchestrator.errors import JobError
from orchestrator.job.job_file import Job, flat
from orchestrator.runs.mirror.numbers import Number, numbers_of
from orchestrator.runs.run_folder import RunFolder


class Tracker(Protocol):
    """What keeps curves."""

    hint: str  # what shows them

    def add(self, numbers: Iterable[Number]) -> None:
        """Keep more numbers, steps in their order."""
        ...

    def close(self, state: str) -> None:
        """The run ended so."""
        ...


class TensorBoard:
    """Event files in the run's folder `tensorboard`."""

    def __init__(self, run: RunFolder, job: Job) -> None:
        from tensorboardX import SummaryWriter

        folder = run.path / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self.hint = f"tensorboard --logdir {run.path.parent}"
        self._writer: Any = SummaryWriter(str(folder))

    def add(self, numbers: Iterable[Number]) -> None:
        for one in numbers:
            self._writer.add_scalar(one.name, one.value, one.step, one.time)
        self._writer.flush()

    def close(self, state: str) -> None:
        self._writer.close()


class WeightsAndBiases:
    """An offline run in the run's folder `wandb`, which `wandb sync` sends."""

    def __init__(self, run: RunFolder, job: Job) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        folder = run.path / "wandb"
        shutil.rmtree(folder, ignore_errors=True)
        self.hint = f"wandb sync {folder}/offline-run-*"
        stated = flat(job.spec.model_dump(exclude_unset=True))
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        self._run: Any = wandb.init(
            project=job.spec.name,
            id=run.run_id,
            name=run.run_id,
            dir=str(run.path),
            mode="offline",
            config={key: str(value) for key, value in stated.items()},
            settings=settings,
        )

    def add(self, numbers: Iterable[Number]) -> None:
        for step, together in groupby(numbers, key=lambda one: one.step):
            self._run.log({one.name: one.value for one in together} | {"step": step})

    def close(self, state: str) -> None:
        self._run.finish(exit_code=0 if state == "finished" else 1)


_TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check_installed(job: Job) -> None:
    """Raises JobError where a tracker that the job wants is not installed."""
    for name in job.spec.tracking.report_to:
        if (package := _PACKAGES.get(name)) and importlib.util.find_spec(package) is None:
            raise JobError(f"tracking.report_to: {name} is not installed: pip install {package}")


class LocalTrackers:
    """The trackers that a job wants, kept up to date with the events of its run."""

    def __init__(self, run: RunFolder, job: Job) -> None:
        wanted = [name for name in job.spec.tracking.report_to if name in _TRACKERS]
        self._run, self._offset, self._members = run, 0, []
        self._trackers: list[Tracker] = [_TRACKERS[name](run, job) for name in wanted]

    def send(self) -> None:
        """Add what happened since the last time."""
        if not self._trackers:
            return
        events, self._offset = self._run.events(self._offset)
        numbers = list(numbers_of(events, self._run.plan, self._members))
        for tracker in self._trackers:
            tracker.add(numbers)

    def finish(self, state: str) -> list[str]:
        """Add the rest; what shows each tracker's curves."""
        self.send()
        for tracker in self._trackers:
            tracker.close(state)
        return [tracker.hint for tracker in self._trackers]
