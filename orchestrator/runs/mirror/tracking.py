"""MLflow as a mirror of the run folder: what is here is sent there, and can be sent again.

Where the mirror stands is kept in the run's tracking.json, so a run whose server was down is sent later by `sync`.  The
only module that knows MLflow.
"""

from __future__ import annotations

import logging
import os
import shlex
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from clusters.safe.masking import masked
from clusters.safe.reading import first_line
from orchestrator.errors import OrchestratorError
from orchestrator.job.job_file import Job, flat
from orchestrator.job.secrets import SecretMissing, secret_names
from orchestrator.planning.plan import settings_of
from orchestrator.runs import worker_stats
from orchestrator.runs.events import (
    BetweenReport,
    Evaluation,
    Event,
    LearningReport,
    Member,
    PredictionReport,
    QualityReport,
    StepReport,
    TrackingReport,
    WorkerGroup,
)
from orchestrator.runs.mirror.state import Sent, TrackingFailed, address_of, check_reachable, requested_uri
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.search_folder import Concluded, SearchFolder, Trial, read_trials

_METRICS_A_CALL = 500
_FIRST_S, _EVERY_S = 60.0, 30.0  # the first use of a store migrates it: not while a short run needs the cores
_MASKED_BYTES = 64 * 2**20  # of a file that is looked through for passwords before it is sent; texts are smaller
_STATES = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "interrupted": "KILLED"}
_METRIC_FIELDS: dict[type[Event], tuple[str, ...]] = {
    PredictionReport: ("predicted_step_s", "measured_step_s", "predicted_bytes", "measured_peak_bytes"),
    StepReport: (
        "loss",
        "grad_norm",
        "learning_rate",
        "epoch",
        "tokens_per_s",
        "supervised_tokens",
        "tokens",
        "peak_bytes",
        "bus_down_bytes",
        "bus_up_bytes",
    ),
    Evaluation: ("eval_loss",),
}
_TRIAL_NUMBERS = (
    *("step_s", "predicted_step_s", "tensors_bytes", "predicted_tensors_bytes"),
    *("tokens_per_s", "seconds", "steps"),
)


class Mirror:
    """Keeps MLflow up to date while a run trains; never fails the run."""

    def __init__(self, run: RunFolder, job: Job) -> None:
        self._run, self._job = run, job
        self._wanted = bool(job.spec.tracking.report_to)
        self._next = time.monotonic() + _FIRST_S
        self.offset_at_start = run.end_of_events()

    def load(self) -> None:
        """Import MLflow, which takes seconds, for which nobody should wait at the end of a run.  Raises ImportError."""
        if self._wanted:
            _keep_to_itself()
            import mlflow.store.tracking.sqlalchemy_store
            import mlflow.tracking  # noqa: F401

    def send_if_due(self) -> None:
        """Send what is new if the last time was long enough ago."""
        if self._wanted and time.monotonic() >= self._next:
            self._send("running")
            self._next = time.monotonic() + _EVERY_S

    def finish(self) -> None:
        """Send the rest, with the artifacts and how the run ended; no word of an end: it was interrupted."""
        if self._wanted:
            state = self._run.state_by_events()
            self._send("interrupted" if state == "running" else state)

    def _send(self, state: str) -> None:
        try:
            address = _send_to(self._run, self._job, lambda uri: _Sender(self._run, self._job, uri).send(state))
        except OrchestratorError as error:
            self._run.record(TrackingReport(ok=False, text=str(error)))
            self._wanted = state != "running" and self._wanted  # say it once; `sync` sends everything later
        else:
            if state != "running":
                self._run.record(TrackingReport(ok=True, text=address))


def sync(run: RunFolder, job: Job, experiment: str | None = None, state: str | None = None) -> str:
    """Bring MLflow to where a run stands: metrics, artifacts, state; returns the store's address without its password.

    Sends only what it has not sent yet; an unfinished run stays RUNNING there.  `experiment` is used instead of the
    job's, now and later; `state` is given by the driver that holds the lock.  Raises TrackingFailed.
    """
    state = state or run.state()
    return _send_to(run, job, lambda uri: _Sender(run, job, uri, experiment).send(state))


def sync_search(folder: SearchFolder, job: Job, experiment: str | None = None) -> str:
    """Send a search as one run with a nested run a trial; returns the store's address.

    What is there already is not sent twice.  Raises TrackingFailed.
    """
    return _send_to(folder, job, lambda uri: _SearchSender(folder, job, uri, experiment).send())


def complete(run: RunFolder, job: Job, state: str | None = None) -> str | None:
    """`sync` for a run that has ended, where something is left to send; None where MLflow has it all or is not wanted.

    Cheap where nothing is left, and right to call twice.  Raises TrackingFailed.
    """
    state = state or run.state()
    if not job.spec.tracking.report_to or state == "running":
        return None
    if isinstance(run, SearchFolder):
        return sync_search(run, job)
    sent = Sent.of(run)
    is_sent = sent and sent.state == state and sent.requested_uri == requested_uri(job)
    if sent and is_sent and all(isinstance(event, TrackingReport) for event in run.events(sent.offset)[0]):
        return None
    return sync(run, job, state=state)


def _keep_to_itself() -> None:
    """MLflow reports its use to nobody; it reads this when it is imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def _send_to(run: RunFolder, job: Job, send: Callable[[str], None]) -> str:
    _keep_to_itself()
    shown = requested_uri(job) or ""
    try:
        Sent.of(run)  # a damaged record is said before a server is asked
        uri = address_of(run, job)
        shown = masked(uri)
        check_reachable(uri)
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


class _Store:
    """A run folder's place in an MLflow store."""

    def __init__(self, run: RunFolder, job: Job, uri: str, experiment: str | None = None) -> None:
        from mlflow.tracking import MlflowClient

        for noisy in ("mlflow", "alembic"):  # after the import, which sets levels of its own
            logging.getLogger(noisy).setLevel(logging.ERROR)
        self.run, self.job, self.uri = run, job, uri
        self.client = MlflowClient(tracking_uri=uri)
        sent = Sent.of(run)
        if sent is None or sent.uri != masked(uri):
            sent = Sent(masked(uri))
        if experiment and experiment != (sent.experiment or job.spec.tracking.experiment):
            sent = Sent(sent.uri, experiment=experiment)
        sent.requested_uri = requested_uri(job)
        self.sent = sent

    def open(self, tags: dict[str, str]) -> str:
        """The id of the run there: of the one that was begun before, or of a new one.

        Raises TrackingFailed where it or its experiment was deleted.
        """
        sent = self.sent
        if sent.mlflow_run_id and (found := self._found(sent.mlflow_run_id)):
            if found.info.lifecycle_stage == "active":
                return sent.mlflow_run_id
            self._check(self.client.get_experiment(found.info.experiment_id))
            self._refuse_deleted(f"the run {found.info.run_id}", f"runs restore -r {found.info.run_id}")
        if sent.mlflow_run_id:  # the store is another one, or has thrown the run away
            self.sent = sent = Sent(sent.uri, experiment=sent.experiment, requested_uri=sent.requested_uri)
        experiment = self._experiment()
        known = self.client.search_runs([experiment], f"tags.run_key = '{sent.key}'") if sent.key else []
        if not known:
            sent.key = uuid.uuid4().hex
            sent.keep(self.run)  # first: a process that is killed now finds the run by it
        tags |= {"run_folder": str(self.run.path), "run_key": sent.key or ""}
        sent.mlflow_run_id = known[0].info.run_id if known else self.open_run(experiment, self.run.run_id, tags)
        sent.state = "running"
        sent.keep(self.run)
        return sent.mlflow_run_id

    def open_run(self, experiment: str, name: str, tags: dict[str, str]) -> str:
        return self.client.create_run(experiment, run_name=name, tags=tags).info.run_id

    def _found(self, run_id: str) -> Any | None:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _experiment(self) -> str:
        """The id of the experiment, made where it is not there.  Raises TrackingFailed for one that was deleted."""
        from mlflow.exceptions import MlflowException

        name = self.sent.experiment or self.job.spec.tracking.experiment
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            local = self.uri.startswith("sqlite:")
            artifacts = (self.run.path.parent / "mlartifacts").as_uri() if local else None
            try:
                return self.client.create_experiment(name, artifact_location=artifacts)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run made it at the same moment
                    raise
                return self._experiment()
        self._check(experiment)
        return experiment.experiment_id

    def _check(self, experiment: Any) -> None:
        if experiment.lifecycle_stage != "active":
            restore = f"experiments restore -x {experiment.experiment_id}"
            self._refuse_deleted(f"the experiment {experiment.name!r}", restore)

    def _refuse_deleted(self, what: str, restore: str) -> NoReturn:
        place, run_id = masked(self.uri), self.run.run_id
        raise TrackingFailed(
            f"MLflow at {place}: {what} was deleted there. Restore it (MLFLOW_TRACKING_URI={shlex.quote(place)} mlflow"
            f" {restore}), then `orchestrator sync {run_id}`; or send it into another experiment:"
            f" `orchestrator sync {run_id} --experiment NAME`"
        )

    def send_file(self, run_id: str, file: Path, folder: str | None = None) -> None:
        """A file as an artifact; passwords in a text are masked."""
        if file.suffix != ".safetensors" and file.stat().st_size <= _MASKED_BYTES:
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                text = ""
            if (shown := masked(text)) != text:
                self.client.log_text(run_id, shown, f"{folder}/{file.name}" if folder else file.name)
                return
        self.client.log_artifact(run_id, str(file), folder)


class _SearchSender(_Store):
    def send(self) -> None:
        summary = SearchFolder(self.run.path).summary()
        chosen = summary.recommended if summary else None
        parent = self.open({"kind": "search"})
        outcomes = {outcome.trial: outcome for outcome in (summary.outcomes if summary else ())}
        for trial in read_trials(self.run.path / "trials.jsonl"):
            if str(trial.number) not in self.sent.trials:
                self._send_trial(parent, trial, outcomes.get(trial.number))
        for number, run_id in self.sent.trials.items():
            self.client.set_tag(run_id, "best", str(chosen is not None and int(number) == chosen.trial).lower())
        if chosen:
            for key in ("total_s", "peak_bytes", "cost", "eval_loss"):
                if (value := getattr(chosen, key)) is not None:
                    self.client.log_metric(parent, f"recommended.{key}", value)
            self.client.set_tag(parent, "best_trial", self.sent.trials[str(chosen.trial)])
            self.client.set_tag(parent, "best_combination", chosen.name[:5000])
        for file in sorted(self.run.path.iterdir()):
            if file.is_file() and not file.name.startswith(".") and file.name not in ("stop", "tracking.json"):
                self.send_file(parent, file)
        state = self.run.state()
        if state in _STATES:
            found_nothing = state == "finished" and not chosen
            self.client.set_terminated(parent, status="FAILED" if found_nothing else _STATES[state])
        self.sent.state = state
        self.sent.keep(self.run)

    def _send_trial(self, parent: str, trial: Trial, outcome: Concluded | None) -> None:
        """One nested run, in two calls: each takes a server 30 ms."""
        from mlflow.entities import Metric, Param

        tags = {"mlflow.parentRunId": parent, "status": trial.status, "node": trial.node}
        tags |= {"reason": trial.reason[:5000]} if trial.reason else {}
        run_id = self.open_run(self._experiment(), trial.name or f"trial-{trial.number}", tags)
        numbers = {
            **trial.quality,
            **{key: getattr(trial, key) for key in _TRIAL_NUMBERS},
            **{f"real.{key}": getattr(outcome, key, None) for key in ("total_s", "peak_bytes", "cost")},
        }
        now_ms = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now_ms, 0) for key, value in numbers.items() if value is not None]
        metrics += [Metric("eval_loss", loss, now_ms, step) for step, loss in trial.curve]
        params = [Param(key, masked(str(value))[:6000]) for key, value in trial.point.items()]
        self.client.log_batch(run_id, metrics=metrics, params=params)
        self.client.set_terminated(run_id, status="FAILED" if trial.status == "failed" else "FINISHED")
        self.sent.trials[str(trial.number)] = run_id
        self.sent.keep(self.run)


class _Sender(_Store):
    def send(self, state: str) -> None:
        """Everything that is new; a run in an end state also with its artifacts."""
        run_id = self.open({})
        if not self.sent.has_params:
            self._send_params(run_id)
        self._send_metrics(run_id)
        if state in _STATES:
            self._send_artifacts(run_id)
            self.client.set_terminated(run_id, status=_STATES[state])
        elif self.sent.state != state:  # it ended before, and was resumed
            self.client.update_run(run_id, status="RUNNING")
        self.sent.state = state
        self.sent.keep(self.run)

    def _send_params(self, run_id: str) -> None:
        from mlflow.entities import Param

        plan = self.run.plan()
        params = flat(self.job.spec.model_dump()) | {f"plan.{k}": v for k, v in settings_of(plan).items()}
        params["plan.hash"] = plan.hash
        entities = [Param(key, masked(str(value))[:6000]) for key, value in params.items()]
        for start in range(0, len(entities), 100):
            self.client.log_batch(run_id, params=entities[start : start + 100])
        self.sent.has_params = True

    def _send_metrics(self, run_id: str) -> None:
        from mlflow.entities import Metric

        events, offset = self.run.events(self.sent.offset)
        plan = self.run.plan() if any(map(_is_about_stages, events)) else None
        metrics = []
        for event in events:
            if isinstance(event, WorkerGroup):
                self.sent.members = [{"node": one.node, "device": one.device} for one in event.members]
            when_ms, step = int(event.time * 1000), getattr(event, "step", None) or 0
            numbers = _metrics_of(event, [Member(**one) for one in self.sent.members])
            if plan and plan.techniques.stage and _is_about_stages(event):
                numbers |= worker_stats.stage_metrics(plan, event if isinstance(event, StepReport) else None)
            metrics += [Metric(name, float(value), when_ms, step) for name, value in numbers.items()]
        for start in range(0, len(metrics), _METRICS_A_CALL):
            self.client.log_batch(run_id, metrics=metrics[start : start + _METRICS_A_CALL])
        self.sent.offset = offset
        self.sent.keep(self.run)

    def _send_artifacts(self, run_id: str) -> None:
        """The run folder without checkpoints, caches and lock files."""
        for file in sorted(self.run.path.rglob("*")):
            relative = file.relative_to(self.run.path)
            hidden = any(part.startswith(".") for part in relative.parts)
            if not file.is_file() or hidden or relative.parts[0] in ("checkpoints", "stop"):
                continue
            folder = str(Path(*relative.parts[:-1])) if len(relative.parts) > 1 else None
            self.send_file(run_id, file, folder)


def _is_about_stages(event: Event) -> bool:
    """Whether a plan with stages says more of it: of a step in stages, or of the end of any run."""
    return isinstance(event, PredictionReport) or (isinstance(event, StepReport) and event.stage_busy_s is not None)


def _metrics_of(event: Event, members: Sequence[Member]) -> dict[str, float]:
    """What MLflow draws of an event."""
    found = {name: getattr(event, name) for name in _METRIC_FIELDS.get(type(event), ())}
    match event:
        case StepReport():
            busy = {f"lane.{lane}_s": seconds for lane, seconds in (event.lane_s or {}).items()}
            found |= worker_stats.metrics(members, event) | busy | (event.rewards or {})
        case Evaluation():
            found |= {f"eval_{name}": value for name, value in _numbers(event.extra).items()}
        case LearningReport():
            found |= {f"learnt.{name}": value for name, value in _numbers(event.extra).items()}
        case BetweenReport():
            found |= {f"between.{name}": value for name, value in _numbers(event.extra).items()}
        case QualityReport():
            values = {"eval_loss": event.eval_loss, **event.extra}
            found |= {f"{event.when}.{name}": value for name, value in _numbers(values).items()}
    return {name: value for name, value in found.items() if value is not None}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in values.items() if isinstance(value, int | float)}
