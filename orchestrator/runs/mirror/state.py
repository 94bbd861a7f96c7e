"""How far MLflow mirrors a run, kept in the run's tracking.json, and where the mirror stands.  Loads no MLflow."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from clusters.safe.masking import masked
from clusters.safe.reading import BadInput, read_json, record
from orchestrator.errors import OrchestratorError
from orchestrator.job.job_file import Job
from orchestrator.job.secrets import with_values
from orchestrator.runs.run_folder import RunFolder

_KNOCK_S = 5.0
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


class TrackingFailed(OrchestratorError):
    """The mirror could not be brought up to date; the run itself is unharmed."""

    exit_code = 4


@dataclass
class Sent:
    """How far the mirror is: the run's tracking.json."""

    uri: str  # masked
    offset: int = 0  # bytes of events.jsonl whose metrics are there
    mlflow_run_id: str | None = None
    key: str | None = None  # a tag of the run, by which it is found where its id was lost
    state: str | None = None  # of the run when it was last sent
    experiment: str | None = None  # instead of the job's
    has_params: bool = False
    model_id: str | None = None  # of the logged model
    members: list[dict[str, Any]] = field(default_factory=list)
    trials: dict[str, str] = field(default_factory=dict)  # of a search: number -> MLflow run
    requested_uri: str | None = None  # as the job writes it, masked

    @classmethod
    def of(cls, run: RunFolder) -> Sent | None:
        """None before anything was sent.  Raises TrackingFailed for a file that is damaged."""
        path = run.path / "tracking.json"
        if not path.exists():
            return None
        try:
            found = record(cls, _renamed(read_json(path)), str(path))
        except BadInput as error:
            raise TrackingFailed(f"{error}. Delete it and `orchestrator sync {run.run_id}` sends a new run") from None
        return replace(found, offset=max(0, found.offset))

    def keep(self, run: RunFolder) -> None:
        run.write("tracking.json", json.dumps(asdict(self)))


def _renamed(values: Any) -> Any:
    """The fields of a file that an earlier version wrote, by their names of today."""
    if not isinstance(values, dict) or "asked_uri" not in values:
        return values
    return {"requested_uri": values["asked_uri"], **values}


def wants_mlflow(job: Job) -> bool:
    """Whether the job's results are mirrored to MLflow."""
    return "mlflow" in job.spec.tracking.report_to


def is_left_running(run: RunFolder) -> bool:
    """Whether MLflow takes a run for running that has ended, as one does whose driver was killed."""
    sent = Sent.of(run)
    return sent is not None and sent.state == "running" and run.state() != "running"


def requested_uri(job: Job) -> str | None:
    """The store as the job writes it, masked."""
    return masked(job.spec.tracking.mlflow_uri) if job.spec.tracking.mlflow_uri else None


def address_of(run: RunFolder, job: Job) -> str:
    """The store's URI with its secrets; a SQLite file with a relative path stays where it was first written.

    Raises SecretMissing.
    """
    asked = job.spec.tracking.mlflow_uri
    if asked is None:
        return f"sqlite:///{run.path.parent / 'mlflow.db'}"
    file = asked.removeprefix("sqlite:///")
    if asked == file or file.startswith((":memory:", "/", "$")):
        return with_values(asked, os.environ)
    sent = Sent.of(run)
    return sent.uri if sent and sent.requested_uri == requested_uri(job) else f"sqlite:///{Path(file).absolute()}"


def check_reachable(uri: str) -> None:
    """Fail within seconds where no server listens: MLflow's own client would try for minutes."""
    parts = urlsplit(uri)
    port = parts.port or _PORTS.get(parts.scheme.partition("+")[0])
    if parts.hostname and port:
        socket.create_connection((parts.hostname, port), timeout=_KNOCK_S).close()
