"""One trial: set up at its first step, trained from rung to rung, reported at each.  No Ray."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clusters.hardware.gpus import look_at_gpus
from orchestrator.errors import NothingFits, OrchestratorError, RunFailed
from orchestrator.job.job_file import Job, spec_with
from orchestrator.planning.plan import Plan
from orchestrator.runs.search_folder import SearchFolder, Trial
from orchestrator.search.advice import plan_for
from strategies.step import host_memory

if TYPE_CHECKING:  # it loads torch, for which a process that only decides has no use
    from orchestrator.training.worker_context import RunSeat

_WHAT_TRIALS_RAISE = (OrchestratorError, RuntimeError, ValueError, MemoryError, NotImplementedError)


def rungs(num_steps: int) -> list[int]:
    """Steps at which a trial is measured and may be stopped: a quarter, half, all."""
    return sorted({math.ceil(num_steps / 4), math.ceil(num_steps / 2), num_steps})


class TrialRun:
    """A point on one device.

    With a seat it shares its base model with other trials of this process: its seconds are then those in which it had
    its turn, and its part of the passes.
    """

    def __init__(self, config: Mapping[str, Any], node: str, seat: RunSeat | None = None) -> None:
        """`config`: the search's `folder`, the trial's `number`, `point` and `plans` by node, as JSON."""
        self._config, self._node, self._seat = config, node, seat
        self._experiment: Any = None
        self._began, self._own_s = time.perf_counter(), 0.0
        gc.collect()
        host_memory.trim()

    @property
    def notes(self) -> list[str]:
        """What its set-up has to say."""
        return self._experiment.notes if self._experiment else []

    def step(self) -> dict[str, Any]:
        """Train to the next rung and report."""
        began, seat = time.perf_counter(), self._seat
        before = seat.others_s if seat else 0.0
        loss, quality, ended, error = self._train()
        if seat:
            self._own_s += time.perf_counter() - began - (seat.others_s - before)
        return self._report(loss, quality, ended, error)

    def failed(self, error: BaseException) -> dict[str, Any]:
        """The report of an end that nobody expected."""
        return self._report(None, {}, True, error)

    def close(self) -> None:
        """Free what it holds."""
        if self._experiment is not None:
            self._experiment.close()
        self._experiment = None
        gc.collect()

    def _train(self) -> tuple[float | None, dict[str, float], bool, Exception | None]:
        """Held-out loss, metrics of its end, whether it ended, and why it failed."""
        try:
            experiment = self._experiment = self._experiment or self._experiment_of()
            done = experiment.progress.step
            target = next(rung for rung in rungs(experiment.plan.num_steps) if rung > done)
            loss = experiment.train_to(target)
            if not math.isfinite(loss):
                raise RunFailed(f"the held-out loss is not a number after {target} steps: lower train.learning_rate")
            ended = target == experiment.plan.num_steps
            quality = experiment.quality() if ended and self._job.spec.search.metric != "eval_loss" else {}
        except _WHAT_TRIALS_RAISE as error:
            return None, {}, True, error
        return loss, quality, ended, None

    def _experiment_of(self) -> Any:
        from orchestrator.data.prepare import datasets
        from orchestrator.training.workers.experiment import Experiment

        folder = SearchFolder(Path(self._config["folder"]))
        job = folder.job()
        self._job = Job(spec_with(job.spec, self._config["point"]), job.folder, job.text)
        plan = plan_for([Plan.from_json(text) for text in self._config["plans"][self._node]], look_at_gpus()[0])
        files = folder.samples()[str(plan.max_length)]
        data, held_out = datasets(files)
        assert held_out is not None  # the search made sure
        rows = data.select(files.train_rows), held_out.select(files.eval_rows)
        return Experiment(self._job, plan, files.model, *rows, self._seat)

    def _report(
        self, loss: float | None, quality: dict[str, float], ended: bool, error: BaseException | None
    ) -> dict[str, Any]:
        lines = str(error).strip().splitlines() if error else []
        seconds = self._own_s if self._seat else time.perf_counter() - self._began
        trial = Trial(
            number=self._config["number"],
            point=self._config["point"],
            status="failed" if error else "finished" if ended else "stopped",
            node=self._node,
            reason=(lines[0] if lines else type(error).__name__) if error else None,
            seconds=round(seconds, 3),
            eval_loss=loss,
            quality=quality,
        )
        values = asdict(trial)
        if self._experiment is not None and error is None:
            values |= _figures(self._experiment)
        judged = math.inf if loss is None else _rounded(loss, self._job.spec.search.quality_tolerance)
        short = isinstance(error, NothingFits | MemoryError)
        return {
            "step": values["steps"],
            "judged": judged,
            "trial": values,
            "done": ended or error is not None,
            "short_of_memory": short,
        }


def trial_of(report: Mapping[str, Any]) -> Trial:
    """The trial as it stood at a report."""
    values = report["trial"]
    return Trial(**{**values, "curve": [tuple(point) for point in values["curve"]]})


def _figures(experiment: Any) -> dict[str, Any]:
    """What an experiment measured so far, as fields of a trial; of shared passes no time is predicted."""
    times = experiment.times()
    return {
        "steps": experiment.progress.step,
        "curve": experiment.curve,
        "step_s": times["measured_step_s"],
        "tokens_per_s": experiment.tokens_per_s,
        "tensors_bytes": experiment.tensors_bytes,
        "predicted_step_s": None if "runs_together" in times else experiment.plan.step_s,
        "predicted_tensors_bytes": experiment.plan.memory.tensors_bytes,
        "time": times,
    }


def _rounded(loss: float, tolerance: float) -> float:
    """To steps of the tolerance: what is as good must not be stopped for a difference that does not count."""
    if loss <= 0 or not math.isfinite(loss):
        return loss
    step = math.log1p(max(tolerance, 1e-3))
    return math.exp(step * round(math.log(loss) / step))
