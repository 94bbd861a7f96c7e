"""The end of a run: steps that may be done twice, and a record of those that are done.

Killed between any two of them, the same command does the rest.  ending.json says which are done, for what the run
handed back and for where the job wants it: for another adapter, bank or server they are done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.errors import JobError, OrchestratorError, RunFailed
from orchestrator.job.job_file import Job
from orchestrator.lifecycle.hooks import NO_BANK, BankHooks
from orchestrator.runs import record
from orchestrator.runs.events import Event, Note, TrackingReport
from orchestrator.runs.model_card import write_card
from orchestrator.runs.run_folder import RunFolder

_FILE = "ending.json"


@dataclass(frozen=True)
class EndStep:
    """One step at the end of a run; `do` may be repeated, and returns the event to record."""

    name: str
    target: Callable[[Job], str | None]  # where to; None where the job does not ask for it
    do: Callable[[RunFolder, Job], Event | None] | None  # None where the caller handed in no way to do it


def _write_card(run: RunFolder, job: Job) -> None:
    try:
        write_card(run, job)
    except OSError as error:
        raise RunFailed(f"{run.exported()}: the model card cannot be written: {error.strerror}") from error


def _send_to_mlflow(run: RunFolder, job: Job) -> Event | None:
    from orchestrator.runs.mirror.tracking import complete

    address = complete(run, job, state=run.state_by_events())
    return TrackingReport(ok=True, text=address) if address else None


def mirror_again(run: RunFolder, job: Job, say: Callable[[str], None]) -> None:
    """Send to MLflow what was measured of a run after its end; a failure is said, and `sync` does it later."""
    try:
        _send_to_mlflow(run, job)
    except OrchestratorError as error:
        say(str(error))


def _steps(bank: BankHooks) -> tuple[EndStep, ...]:
    add = bank.add
    return (
        EndStep("card", lambda job: "", _write_card),
        EndStep(
            "bank",
            lambda job: str(job.path(job.spec.bank.path)) if job.spec.bank.add else None,
            None if add is None else lambda run, job: Note(add(run, job)),
        ),
        EndStep(
            "tracking",
            lambda job: f"{job.spec.tracking.mlflow_uri}" if "mlflow" in job.spec.tracking.report_to else None,
            _send_to_mlflow,
        ),
    )


def pending(run: RunFolder, job: Job, bank: BankHooks = NO_BANK) -> list[EndStep]:
    """The steps that are still to be done; of a run of an earlier version, which kept no record, none is known."""
    if record.read(run.path) is None:
        return []
    done = _done(run)
    wanted = [(step, step.target(job)) for step in _steps(bank)]
    return [step for step, target in wanted if target is not None and done.get(step.name) != _mark(run, target)]


def finish(run: RunFolder, job: Job, report: Callable[[Event], None], bank: BankHooks = NO_BANK) -> None:
    """Do what is pending and report what came of each as an event; the caller holds the run.

    What fails is reported and stays pending: a finished run is not lost for a bank or a server.
    """
    for step in pending(run, job, bank):
        if step.do is None:
            continue
        try:
            event = step.do(run, job)
        except OrchestratorError as error:
            text = str(error)
            event = TrackingReport(ok=False, text=text) if step.name == "tracking" else Note(text)
        else:
            target = step.target(job)
            run.write(_FILE, json.dumps({**_done(run), step.name: _mark(run, target or "")}, indent=1))
        if event:
            run.record(event)
            report(event)


def _done(run: RunFolder) -> dict[str, Any]:
    try:
        return run.read_json(_FILE) or {}
    except JobError:  # damaged: nothing is known to be done, and each step may be done twice
        return {}


def _mark(run: RunFolder, target: str) -> str:
    """What a step was done for: the bytes handed back and the place, as a digest (a place may hold a password)."""
    result = run.result()
    handed = result.handed_back if result else None
    files = {name: asdict(one) for name, one in handed.files.items()} if handed else None
    return hashlib.sha256(json.dumps([files, target], sort_keys=True).encode()).hexdigest()[:16]
