"""Trackers as mirrors of the run folder: what is here is sent there, and can be sent again.

Where the MLflow mirror stands is kept in the run's tracking.json, so a run whose server was down is sent later by
`sync`.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

from clusters.safe.masking import masked
from clusters.safe.reading import first_line
from orchestrator.errors import OrchestratorError
from orchestrator.job.job_file import Job
from orchestrator.job.secrets import SecretMissing, secret_names
from orchestrator.runs.events import TrackingReport
from orchestrator.runs.mirror.local_trackers import LocalTrackers
from orchestrator.runs.mirror.run_sender import RunSender
from orchestrator.runs.mirror.search_sender import SearchSender
from orchestrator.runs.mirror.state import (
    Sent,
    TrackingFailed,
    address_of,
    check_reachable,
    requested_uri,
    wants_mlflow,
)
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.search_folder import SearchFolder

_loading = Lock()
_FIRST_S, _EVERY_S = 60.0, 30.0  # the first use of a store migrates it: not while a short run needs the cores
_PART = 10  # of a driver with several runs: it computes at most one in so many seconds for sending


class Mirror:
    """Keeps the trackers up to date while a run trains; never fails the run."""

    def __init__(self, run: RunFolder, job: Job) -> None:
        self._run, self._job = run, job
        self._wanted = wants_mlflow(job)
        self._local: LocalTrackers | None = None
        self._has_failed = False  # a tracker beside the run
        self._system: Any = None  # MLflow's monitor of this machine
        self._sent_to = -1  # the end of the events when they were sent last
        self.watches_machine = True
        self.due_at = time.monotonic() + _FIRST_S
        self.offset_at_start = run.end_of_events()

    def load(self) -> None:
        """Import MLflow, which takes seconds, for which nobody should wait at the end of a run.  Raises ImportError."""
        if self._wanted:
            _load()

    def send_if_due(self) -> None:
        """Send what is new, if anything is, where the last time was long enough ago."""
        if time.monotonic() < self.due_at:
            return
        end = self._run.end_of_events()
        if end != self._sent_to:
            if self._wanted:
                self._send("running")
            self._send_locally()
        self._sent_to, self.due_at = end, time.monotonic() + _EVERY_S

    def finish(self) -> None:
        """Send the rest, with the artifacts and how the run ended; no word of an end: it was interrupted."""
        state = self._run.state_by_events()
        state = "interrupted" if state == "running" else state
        self.close(state)
        if self._wanted:
            self._send(state)

    def close(self, state: str) -> None:
        """End what is written beside the run; MLflow gets the rest of a finished run with what follows its end."""
        if self._system is not None:
            self._system.finish()
            self._system = None
        for hint in self._send_locally(state):
            self._run.record(TrackingReport(ok=True, text=hint))

    def _send_locally(self, ended: str | None = None) -> list[str]:
        """Keep TensorBoard's and W&B's files up to date; what shows them, where the run has ended."""
        if self._has_failed:
            return []
        try:
            self._local = self._local or LocalTrackers(self._run, self._job)
            if ended is None:
                self._local.send()
                return []
            return self._local.finish(ended)
        except Exception as error:  # a library can fail in any way; the run continues
            self._run.record(TrackingReport(ok=False, text=f"a tracker beside the run failed: {first_line(error)}"))
            self._has_failed = True  # say it once
            return []

    def _send(self, state: str) -> None:
        try:
            address = _send_to(self._run, self._job, lambda uri: self._send_to_mlflow(uri, state))
        except OrchestratorError as error:
            self._run.record(TrackingReport(ok=False, text=str(error)))
            self._wanted = state != "running" and self._wanted  # say it once; `sync` sends everything later
        else:
            if state != "running":
                self._run.record(TrackingReport(ok=True, text=address))

    def _send_to_mlflow(self, uri: str, state: str) -> None:
        """Send, and begin to watch the machine of a run that goes on for longer than the first minute."""
        sender = RunSender(self._run, self._job, uri)
        sender.send(state)
        if state == "running" and self._system is None and self.watches_machine:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            nodes = {node.node for node in self._run.plan().nodes}
            name = socket.gethostname() if len(nodes) > 1 else None
            run_id = sender.sent.mlflow_run_id
            self._system = SystemMetricsMonitor(run_id, resume_logging=True, node_id=name, tracking_uri=uri)
            self._system.start()


class Mirrors:
    """Those of runs that train in one process: they take turns, and the first alone watches the machine."""

    def __init__(self, mirrors: Sequence[Mirror]) -> None:
        self._mirrors, self._next = mirrors, 0.0
        for mirror in mirrors[1:]:
            mirror.watches_machine = False

    def send_if_due(self) -> None:
        """Have the one send that has waited for longest."""
        if time.monotonic() < self._next:
            return
        began = time.thread_time()
        min(self._mirrors, key=lambda mirror: mirror.due_at).send_if_due()
        self._next = time.monotonic() + _PART * (time.thread_time() - began)


def sync(run: RunFolder, job: Job, experiment: str | None = None, state: str | None = None) -> str:
    """Bring MLflow to where a run stands: metrics, artifacts, state; returns the store's address without its password.

    Sends only what it has not sent yet; an unfinished run stays RUNNING there.  `experiment` is used instead of the
    job's, now and later; `state` is given by the driver that holds the lock.  Raises TrackingFailed.
    """
    state = state or run.state()
    return _send_to(run, job, lambda uri: RunSender(run, job, uri, experiment).send(state))


def sync_search(folder: SearchFolder, job: Job, experiment: str | None = None) -> str:
    """Send a search as one run with a nested run a trial; returns the store's address.

    What is there already is not sent twice.  Raises TrackingFailed.
    """
    return _send_to(folder, job, lambda uri: SearchSender(folder, job, uri, experiment).send())


def complete(run: RunFolder, job: Job, state: str | None = None) -> str | None:
    """`sync` for a run that has ended, where something is left to send; None where MLflow has it all or is not wanted.

    Cheap where nothing is left, and right to call twice.  Raises TrackingFailed.
    """
    state = state or run.state()
    if not wants_mlflow(job) or state == "running":
        return None
    if isinstance(run, SearchFolder):
        return sync_search(run, job)
    sent = Sent.of(run)
    is_sent = sent and sent.state == state and sent.requested_uri == requested_uri(job)
    if sent and is_sent and all(isinstance(event, TrackingReport) for event in run.events(sent.offset)[0]):
        return None
    return sync(run, job, state=state)


def _keep_to_itself() -> None:
    """MLflow reports its use to nobody, which it reads when it is imported, and says nothing of files and types."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    warnings.filterwarnings("ignore", message=".*inferred as AnyType")


def _load() -> None:
    """Import what sending uses, in one thread at a time: its modules import each other, and of two threads that begin
    at different ones each meets what the other has made half.
    """
    with _loading:
        _keep_to_itself()
        import mlflow.pyfunc
        import mlflow.store.tracking.sqlalchemy_store
        import mlflow.tracking  # noqa: F401


def _send_to(run: RunFolder, job: Job, send: Callable[[str], None]) -> str:
    shown = requested_uri(job) or ""
    try:
        Sent.of(run)  # a damaged record is said before a server is asked
        uri = address_of(run, job)
        shown = masked(uri)
        check_reachable(uri)
        _load()
        send(uri)
    except TrackingFailed:
        raise
    except SecretMissing as error:
        raise TrackingFailed(f"MLflow at {shown}: {error}; then `orchestrator sync {run.run_id}`") from None
    except Exception as error:  # a server can fail in any way; the run continues
        reason = first_line(error)
        for name in secret_names(job.spec):
            reason = reason.replace(os.environ.get(name) or name, name)
        raise TrackingFailed(f"MLflow at {shown}: {reason}. `orchestrator sync {run.run_id}` sends it later") from error
    return shown
