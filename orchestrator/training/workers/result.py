"""What a training came to: its counts, its times beside the predicted ones, and result.json."""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import torch

from orchestrator.planning.plan import Plan
from orchestrator.runs.events import PredictionReport, QualityReport, StateChange
from orchestrator.runs.proofs.proof import write_table
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.model.devices import uuid_of
from orchestrator.training.state import Progress
from orchestrator.training.worker_context import WorkerContext
from orchestrator.training.workers.setup import Inputs

T = TypeVar("T")
_OF_TRAINING = ("train_seconds", "time", "energy", "memory", "before")  # in result.json
_OPTIONAL = ("deepspeed", "bitsandbytes", "schedulefree")
_PACKAGES = ("finetune-orchestrator", "torch", "transformers", "peft", "ray", *_OPTIONAL)


@dataclass(frozen=True)
class TrainingOutcome:
    """What one worker's training came to since it was started or resumed."""

    progress: Progress
    first_step: int  # steps done before
    seconds: float
    peak_bytes: int
    energy: dict[str, Any] | None  # of all workers

    @property
    def has_trained(self) -> bool:
        """False where a run was resumed that lacked only its end."""
        return self.progress.step != self.first_step


def result_of(run: RunFolder, context: WorkerContext, inputs: Inputs, outcome: TrainingOutcome) -> dict[str, Any]:
    """What is known before the model is evaluated (runs/json_files.py: RunResult)."""
    progress, plan = outcome.progress, context.plan
    memory = context.seat.memory if context.seat else context.part.memory
    recorded = sorted(run.steps().items())
    steps = [event.seconds for _, event in recorded]
    before = sum(event.seconds for step, event in recorded if step <= outcome.first_step)  # of earlier sittings
    return {
        "steps": progress.step,
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised_tokens,
        "computed_tokens": progress.computed_tokens if progress.computed_tokens < progress.tokens else None,
        "train_seconds": round(before + outcome.seconds, 2),
        "stopped_early": progress.stopped == "early",
        "best_checkpoint": progress.best_checkpoint,
        "before": progress.before,
        "after": None,
        "data_digest": inputs.data.digest,
        "plan_hash": plan.hash,
        "time": step_times(plan, steps) | {"uuid": next(iter(gpu_uuids(context.device)), None)} | shared(context),
        "energy": outcome.energy,
        "versions": versions(),
        "memory": {
            "predicted_bytes": memory.total_bytes,
            "predicted_low_bytes": memory.low_bytes,
            "predicted_high_bytes": memory.high_bytes,
            "measured_peak_bytes": outcome.peak_bytes,
            "libraries_bytes": inputs.libraries_bytes,
        },
    }


def write_result(run: RunFolder, result: dict[str, Any], outcome: TrainingOutcome) -> None:
    """Write result.json; where nothing was left to train, the figures of the training stay those of the earlier one."""
    if not outcome.has_trained and (earlier := run.result()):
        result |= {key: earlier.values[key] for key in _OF_TRAINING if key in earlier.values}
    run.keep("result.json", json.dumps(result, indent=1))


def record_result(run: RunFolder) -> None:
    """Record the predictions beside what was measured, the quality, and that the run is finished; write verify.json."""
    result = run.result()
    assert result is not None  # it has just been written
    times, memory = result.time, result.memory
    if times and times.predicted_step_s and times.measured_step_s:
        step_s = (times.predicted_step_s, times.measured_step_s)
        run.record(PredictionReport(*step_s, memory.predicted_bytes, memory.measured_peak_bytes))
    if result.after:
        run.record(QualityReport.of("after", result.after.values))
    write_table(run)
    run.record(StateChange("finished", step=result.steps))


def skip_warm_up(steps: Sequence[T]) -> Sequence[T]:
    """Without the first steps, which compile kernels and fill caches."""
    return steps[min(3, len(steps) // 2) :]


def step_times(plan: Plan, seconds: Sequence[float]) -> dict[str, Any]:
    """Predicted beside the median of the measured steps."""
    return {
        "predicted_step_s": plan.step_s,
        "formula_step_s": plan.step_s / plan.calibration,  # before what earlier runs taught
        "measured_step_s": statistics.median(skip_warm_up(seconds)) if seconds else None,
        "device": plan.nodes[0].device,
        "uuid": plan.nodes[0].uuid,
        "dtype": plan.techniques.dtype,
    }


def shared(context: WorkerContext) -> dict[str, Any]:
    """Of a run beside others in one process: its times are parts of theirs, and are compared with no prediction."""
    if context.seat is None:
        return {}
    return {"predicted_step_s": None, "formula_step_s": None, "runs_together": context.seat.num_runs}


def sum_energy(of_workers: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Energy of this training over all workers; None unless every one of them could count it."""
    known = [one for one in of_workers if one is not None]
    if len(known) < len(of_workers):
        return None
    return {"wh": sum(one["wh"] for one in known), "source": " and ".join(sorted({one["source"] for one in known}))}


def gpu_uuids(device: torch.device) -> tuple[str, ...]:
    """Of the GPU that really trains, as its driver writes it; none for a CPU."""
    return (uuid_of(device),) if device.type == "cuda" else ()


def versions() -> dict[str, str]:
    """What a run's numbers depend on beside its job."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
