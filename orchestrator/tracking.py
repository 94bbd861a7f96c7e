"""MLflow as a mirror of the run folder: what is here is sent there, and can be sent again.

Where the mirror stands is kept in the run's tracking.json, so a run whose server was down is sent later by `sync`.  The
only module that knows MLflow.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator import workers
from orchestrator.errors import OrchestratorError
from orchestrator.jobfile import Job, flat
from orchestrator.plan import Plan, settings_of
from orchestrator.rundir import RunFolder
from orchestrator.search.trials import SearchFolder, Trial, read_trials

_METRICS_A_CALL = 500
_FIRST_S, _EVERY_S = 60.0, 30.0  # the first use of a store migrates it: not while a short run needs the cores
_KNOCK_S = 5.0
_METRIC_FIELDS = {
    "prediction": ("predicted_step_s", "measured_step_s", "predicted_bytes", "measured_peak_bytes"),
    "step": (
        "loss",
        "grad_norm",
        "learning_rate",
        "epoch",
        "tokens_per_s",
        "supervised_tokens",
        "tokens",
        "peak_bytes",
    ),
    "eval": ("eval_loss",),
}
_TRIAL_NUMBERS = (
    "step_s",
    "predicted_step_s",
    "tensors_bytes",
    "predicted_tensors_bytes",
    "tokens_per_s",
    "seconds",
    "steps",
)


class TrackingFailed(OrchestratorError):
    """The mirror could not be brought up to date; the run itself is unharmed."""

    exit_code = 4


class Mirror:
    """Keeps MLflow up to date while a run goes on; never fails the run."""

    def __init__(self, run: RunFolder, job: Job) -> None:
        self._run, self._job = run, job
        self._wanted = bool(job.spec.tracking.report_to)
        self._next = time.monotonic() + _FIRST_S
        self.offset_at_start = run.events()[1]

    def now_and_then(self) -> None:
        """Send what is new if the last time was long enough ago."""
        if self._wanted and time.monotonic() >= self._next:
            self._send(final=False)
            self._next = time.monotonic() + _EVERY_S

    def finish(self) -> None:
        """Send the rest, with the artifacts."""
        if self._wanted:
            self._send(final=True)

    def _send(self, final: bool) -> None:
        try:
            address = sync(self._run, self._job, final)
        except OrchestratorError as error:
            self._run.record("tracking", ok=False, text=str(error))
            self._wanted = final and self._wanted  # say it once; `sync` sends everything later
        else:
            if final:
                self._run.record("tracking", ok=True, text=address)


def sync(run: RunFolder, job: Job, final: bool = True) -> str:
    """Bring MLflow up to date with a run folder; returns the store's address.

    Sends only what it has not sent yet; with `final` also the state and the artifacts.  Raises TrackingFailed.
    """
    return _sent(run, job, lambda uri: _Sender(run, job, uri).send(final))


def sync_search(folder: SearchFolder, job: Job) -> str:
    """Send a search as one run with a nested run a trial; returns the store's address.

    What is there already is not sent twice.  Raises TrackingFailed.
    """
    return _sent(folder, job, lambda uri: _SearchSender(folder, job, uri).send())


def _sent(run: RunFolder, job: Job, send: Callable[[str], None]) -> str:
    uri = job.spec.tracking.mlflow_uri or f"sqlite:///{run.path.parent / 'mlflow.db'}"
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
    try:
        _knock(uri)
        send(uri)
    except Exception as error:  # a server can fail in any way; the run goes on
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TrackingFailed(f"MLflow at {uri}: {reason}. `orchestrator sync {run.run_id}` sends it later") from error
    return uri


def _knock(uri: str) -> None:
    """Fail within seconds where no server listens: MLflow's own client would try for minutes."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.hostname:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=_KNOCK_S).close()


class _Store:
    """A run folder's place in an MLflow store."""

    def __init__(self, run: RunFolder, job: Job, uri: str) -> None:
        from mlflow.tracking import MlflowClient

        for noisy in ("mlflow", "alembic"):  # after the import, which sets levels of its own
            logging.getLogger(noisy).setLevel(logging.ERROR)
        self.run, self.job, self.uri = run, job, uri
        self.client = MlflowClient(tracking_uri=uri)
        known = run.read_json("tracking.json")
        self.known: dict[str, Any] = known if known and known.get("uri") == uri else {"uri": uri, "offset": 0}

    def _experiment(self) -> str:
        """The id of the job's experiment, made where it is not there."""
        name = self.job.spec.tracking.experiment
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            local = self.uri.startswith("sqlite:")
            artifacts = (self.run.path.parent / "mlartifacts").as_uri() if local else None
            return self.client.create_experiment(name, artifact_location=artifacts)
        return experiment.experiment_id

    def _opened(self, name: str, tags: dict[str, str]) -> str:
        return self.client.create_run(self._experiment(), run_name=name, tags=tags).info.run_id

    def _remember(self) -> None:
        self.run.write("tracking.json", json.dumps(self.known))


class _SearchSender(_Store):
    def send(self) -> None:
        summary = self.run.read_json("summary.json") or {}
        chosen = summary.get("recommended") or {}
        if "mlflow_run_id" not in self.known:
            tags = {"run_folder": str(self.run.path), "kind": "search"}
            self.known |= {"mlflow_run_id": self._opened(self.run.run_id, tags), "trials": {}}
            self._remember()
        parent = self.known["mlflow_run_id"]
        outcomes = {outcome["trial"]: outcome for outcome in summary.get("outcomes", [])}
        for trial in read_trials(self.run.path / "trials.jsonl"):
            if str(trial.number) not in self.known["trials"]:
                self._send_trial(parent, trial, outcomes.get(trial.number))
        for number, run_id in self.known["trials"].items():
            self.client.set_tag(run_id, "best", str(int(number) == chosen.get("trial")).lower())
        for key in ("total_s", "peak_bytes", "cost", "eval_loss"):
            if chosen.get(key) is not None:
                self.client.log_metric(parent, f"recommended.{key}", chosen[key])
        if chosen:
            self.client.set_tag(parent, "best_trial", self.known["trials"][str(chosen["trial"])])
            self.client.set_tag(parent, "best_combination", chosen["name"][:5000])
        for file in sorted(self.run.path.iterdir()):
            if file.is_file() and not file.name.startswith(".") and file.name not in ("stop", "tracking.json"):
                self.client.log_artifact(parent, str(file))
        self.client.set_terminated(parent, status="FINISHED" if chosen else "FAILED")

    def _send_trial(self, parent: str, trial: Trial, outcome: dict[str, Any] | None) -> None:
        """One nested run, in two calls: each takes a server 30 ms."""
        from mlflow.entities import Metric, Param

        tags = {"mlflow.parentRunId": parent, "status": trial.status, "node": trial.node}
        tags |= {"reason": trial.reason[:5000]} if trial.reason else {}
        run_id = self._opened(trial.name or f"trial-{trial.number}", tags)
        numbers = {
            **trial.quality,
            **{key: getattr(trial, key) for key in _TRIAL_NUMBERS},
            **{f"real.{key}": (outcome or {}).get(key) for key in ("total_s", "peak_bytes", "cost")},
        }
        now_ms = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now_ms, 0) for key, value in numbers.items() if value is not None]
        metrics += [Metric("eval_loss", loss, now_ms, step) for step, loss in trial.curve]
        params = [Param(key, str(value)[:6000]) for key, value in trial.point.items()]
        self.client.log_batch(run_id, metrics=metrics, params=params)
        self.client.set_terminated(run_id, status="FAILED" if trial.status == "failed" else "FINISHED")
        self.known["trials"][str(trial.number)] = run_id
        self._remember()


class _Sender(_Store):
    def send(self, final: bool) -> None:
        if "mlflow_run_id" not in self.known:
            tags = {"run_folder": str(self.run.path)}
            self.known["mlflow_run_id"] = self._opened(self.run.run_id, tags)
            self._remember()
            self._send_params()
        self._send_metrics()
        if final:
            self._send_artifacts()
            states = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
            status = states.get(self.run.state_by_events(), "FAILED")
            self.client.set_terminated(self.known["mlflow_run_id"], status=status)

    def _send_params(self) -> None:
        from mlflow.entities import Param

        plan = Plan.from_json((self.run.path / "plan.json").read_text())
        params = flat(self.job.spec.model_dump()) | {f"plan.{k}": v for k, v in settings_of(plan).items()}
        params["plan.hash"] = plan.hash
        entities = [Param(key, str(value)[:6000]) for key, value in params.items()]
        for start in range(0, len(entities), 100):
            self.client.log_batch(self.known["mlflow_run_id"], params=entities[start : start + 100])

    def _send_metrics(self) -> None:
        from mlflow.entities import Metric

        events, offset = self.run.events(self.known["offset"])
        metrics = []
        for event in events:
            when_ms, step = int(event["time"] * 1000), event.get("step", 0)
            for name in _METRIC_FIELDS.get(event["event"], ()):
                metrics.append(Metric(name, float(event[name]), when_ms, step))
            if event["event"] == "group":
                self.known["members"] = [
                    {key: member[key] for key in ("node", "device")} for member in event["members"]
                ]
            if event["event"] == "step" and "worker_s" in event:
                by_worker = workers.metrics(self.known["members"], event)
                metrics += [Metric(name, value, when_ms, step) for name, value in by_worker.items()]
            if event["event"] == "step":  # what an optimizer's lanes sent and how long they were at work
                sent = {key: event[key] for key in ("bus_down_bytes", "bus_up_bytes") if key in event}
                busy = {f"lane.{lane}_s": seconds for lane, seconds in event.get("lane_s", {}).items()}
                metrics += [Metric(k, float(v), when_ms, step) for k, v in (sent | busy).items()]
            if event["event"] == "learnt":
                told = {k: v for k, v in _numbers(event).items() if k != "step"}
                metrics += [Metric(f"learnt.{k}", float(v), when_ms, step) for k, v in told.items()]
            if event["event"] == "quality":
                told = _numbers(event)
                metrics += [Metric(f"{event['when']}.{k}", float(v), when_ms, step) for k, v in told.items()]
        for start in range(0, len(metrics), _METRICS_A_CALL):
            self.client.log_batch(self.known["mlflow_run_id"], metrics=metrics[start : start + _METRICS_A_CALL])
        self.known["offset"] = offset
        self._remember()

    def _send_artifacts(self) -> None:
        """The run folder without checkpoints, caches and lock files."""
        run_id = self.known["mlflow_run_id"]
        for file in sorted(self.run.path.rglob("*")):
            relative = file.relative_to(self.run.path)
            hidden = any(part.startswith(".") for part in relative.parts)
            if not file.is_file() or hidden or relative.parts[0] in ("checkpoints", "stop"):
                continue
            folder = str(Path(*relative.parts[:-1])) if len(relative.parts) > 1 else None
            self.client.log_artifact(run_id, str(file), folder)


def _numbers(event: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if isinstance(value, int | float) and key != "time"}
