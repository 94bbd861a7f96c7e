"""The place of a run folder in an MLflow store: its experiment, its run there, its files."""

from __future__ import annotations

import getpass
import logging
import shlex
import time
import uuid
from pathlib import Path
from typing import Any, NoReturn

from clusters.safe.masking import masked
from orchestrator.job.job_file import Job
from orchestrator.runs.mirror.state import Sent, TrackingFailed, requested_uri
from orchestrator.runs.run_folder import RunFolder

STATES = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "interrupted": "KILLED"}
_FIRST_BYTES = 4096  # of the events, that hold at least one
_MASKED_BYTES = 64 * 2**20  # of a file that is looked through for passwords before it is sent; texts are smaller


class Store:
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
        experiment = self.experiment()
        known = self.client.search_runs([experiment], f"tags.run_key = '{sent.key}'") if sent.key else []
        if not known:
            sent.key = uuid.uuid4().hex
            sent.keep(self.run)  # first: a process that is killed now finds the run by it
        tags |= {"run_folder": str(self.run.path), "run_key": sent.key or "", **self._origin()}
        sent.mlflow_run_id = known[0].info.run_id if known else self.open_run(experiment, self.run.run_id, tags)
        sent.state = "running"
        sent.keep(self.run)
        return sent.mlflow_run_id

    def open_run(self, experiment: str, name: str, tags: dict[str, str], began: float | None = None) -> str:
        """The id of a new run; `began` in seconds since the epoch, None = with the folder's first event."""
        began_ms = int(1000 * (began or began_at(self.run)))
        return self.client.create_run(experiment, began_ms, run_name=name, tags=tags).info.run_id

    def _origin(self) -> dict[str, str]:
        """Who began it and from what, as MLflow's pages name it."""
        spec = self.job.spec
        model, train = spec.model.model_name_or_path, ", ".join(paths_of(spec.data.train))
        method = self.run.plan().method["type"] if (self.run.path / "plan.json").exists() else self.run.kind
        return {
            "mlflow.user": _user(),
            "mlflow.source.type": "JOB",
            "mlflow.source.name": str(self.run.path / self.run.document),
            "mlflow.note.content": masked(f"{spec.name}: {method} of {model} on {train}. Folder: `{self.run.path}`"),
        }

    def _found(self, run_id: str) -> Any | None:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def experiment(self) -> str:
        """The id of the experiment, made where it is not there.  Raises TrackingFailed for one that was deleted."""
        from mlflow.exceptions import MlflowException

        name = self.sent.experiment or self.job.spec.tracking.experiment or project_of(self.run.path)
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            local = self.uri.startswith("sqlite:")
            artifacts = (self.run.path.parent / "mlartifacts").as_uri() if local else None
            try:
                return self.client.create_experiment(name, artifact_location=artifacts)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run made it at the same moment
                    raise
                return self.experiment()
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


def paths_of(stated: Any) -> list[str]:
    """The paths or names of a data key's sources; none of a fraction that is held out."""
    listed = stated if isinstance(stated, list) else [stated]
    return [path for one in listed if (path := one if isinstance(one, str) else getattr(one, "path", None))]


def dataset_name_of(paths: list[str]) -> str:
    """What the rows of some sources are called there."""
    return Path(masked(", ".join(paths))).name[:500]


def _user() -> str:
    """Who runs this; a container's number may have no name."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return "unknown"


def project_of(run: Path) -> str:
    """The name of the folder that a run's folder of runs belongs to."""
    runs = run.resolve().parent
    return (runs.parent if runs.name == "runs" else runs).name or "runs"


def began_at(run: RunFolder) -> float:
    """When the first event was recorded, in seconds since the epoch; now where there is none."""
    events, _ = run.events(0, _FIRST_BYTES)
    return events[0].time if events and events[0].time else time.time()
