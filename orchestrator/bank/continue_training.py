"""A warm start from what the bank made, and how many steps that saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.bank.hooks import BANK_HOOKS
from orchestrator.errors import JobError
from orchestrator.job.job_file import Job, parse_job, text_with
from orchestrator.job.sections.methods import METHOD_SECTIONS
from orchestrator.lifecycle.hooks import Quiet
from orchestrator.lifecycle.run import submit
from orchestrator.runs.events import Evaluation
from orchestrator.runs.run_folder import RunFolder


def train_from(
    job: Job, found: dict[str, Any], against: str | None, runs: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train from the bank's adapter, and count the steps until the loss at which a run from scratch ended.

    `against` is that run, or `fresh` to train it first.  Raises JobError where nothing was recommended, or where the
    runs do not evaluate as they go.
    """
    if found["recommended"] is None:
        raise JobError("nothing that the bank made is better than the base model: train from scratch with `submit`")
    method = {"method.type": _method_with_init(job)}
    if against and job.spec.eval.eval_steps is None:
        raise JobError(
            "--against compares held-out losses during training: set eval.eval_steps, e.g. to a tenth of the steps"
        )
    fresh = None
    if against == "fresh":
        say("training from scratch, to compare ...")
        fresh = submit(_with(job, method), Quiet(), bank=BANK_HOOKS)
    elif against:
        fresh = RunFolder.find(against, runs)
    say("training from the bank's adapter ...")
    start = {"method.init_adapter": str(Path(found["path"]) / "adapter")}
    run = submit(_with(job, method | start), Quiet(), bank=BANK_HOOKS)
    trained: dict[str, Any] = {"run_id": run.run_id, "path": str(run.path), "eval_loss": _evaluations(run)}
    if fresh is None:
        return trained
    ended = _evaluations(fresh)
    if not ended:
        raise JobError(f"{fresh.run_id} was not evaluated during training: there is nothing to compare with")
    goal_step, goal = max(ended.items())
    step = next((step for step, loss in sorted(trained["eval_loss"].items()) if loss <= goal), None)
    return trained | {
        "against": fresh.run_id,
        "against_eval_loss": ended,
        "reached_at": step,
        "steps_saved": None if step is None else goal_step - step,
    }


def _evaluations(run: RunFolder) -> dict[int, float]:
    """Held-out loss by step, in nats a token."""
    return {event.step: event.eval_loss for event in run.events_of(Evaluation)}


def _with(job: Job, values: dict[str, Any]) -> Job:
    return parse_job(text_with(job, values), job.folder)


def _method_with_init(job: Job) -> str:
    """The job's method if it can begin with an adapter, else the first that can."""
    able = [name for name, section in METHOD_SECTIONS.items() if "init_adapter" in section.model_fields]
    return job.spec.method.type if job.spec.method.type in able else able[0]
